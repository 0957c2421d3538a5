"""A Llama of a hundred thousand random parameters: to try things out in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import tables
from lora_jax.models.llama import Llama, LlamaConfig
from lora_jax.models.pretrained import Pretrained


def tiny(vocabulary: int, dtype: Any = "float32", *, scan: bool = False) -> Pretrained:
    """Two layers of width 64 with a tied head, the same parameters every time.

    Args:
      vocabulary: how many ids there are.
      dtype, scan: as `pretrained.load` has them.

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
        dtype=str(jnp.dtype(dtype)),
        param_dtype=str(jnp.dtype(dtype)),
        scan=scan,
    )
    module = Llama(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings = {k: v for k, v in kept.items() if k in _SETTINGS} | {"model_type": "llama"}
    return Pretrained("llama", config, module, params, tables.naming("llama"), settings)


_SETTINGS = (
    *LlamaConfig.REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings"),
)
