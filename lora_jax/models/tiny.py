"""A Llama of a hundred thousand random parameters: to try things out in seconds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import tables
from lora_jax.models.llama import Llama
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.pretrained import Pretrained


def tiny(vocabulary: int) -> Pretrained:
    """Two layers of width 64 with a tied head, the same float32 parameters every time.

    Args:
      vocabulary: how many ids there are.

    >>> model = tiny(11)
    >>> model.apply(model.params, jnp.array([[3, 1, 4]])).shape
    (1, 3, 11)
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    module, ids = Llama(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = _random(jax.eval_shape(module.init, jax.random.key(0), ids)["params"])
    settings = {key: getattr(config, key) for key in _SETTINGS} | {"model_type": "llama"}
    return Pretrained("llama", config, module, params, tables.naming("llama"), settings)


def _random(shapes: Any) -> Any:
    """Numbers of numpy's, which no compiler changes: ones for norms, all else N(0, 0.1²)."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.1, leaf.dtype)

    return jax.tree.map(draw, shapes)


_SETTINGS = (
    *LlamaConfig.REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings"),
)
