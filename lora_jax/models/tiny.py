"""A Llama with a hundred thousand random parameters, to try things out in seconds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.files.naming import to_torch, to_tree
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.decoder.naming import LLAMA
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.weights.quantization import KEEP, Quantize, parse_quantize, quantized_shapes


def tiny(
    vocabulary: int,
    dtype: Any = "float32",
    *,
    scan: bool = False,
    quantize: Quantize | None = None,
) -> Pretrained:
    """Create two layers of width 64 with a tied head; the parameters are always the same.

    Args:
      vocabulary: number of ids.
      dtype, scan, quantize: as in `pretrained.load`; its numbers are not stored as codes, so "keep"
        keeps all as it is.

    >>> model = tiny(11)
    >>> model.apply(model.params, jnp.array([[3, 1, 4]])).shape
    (1, 3, 11)
    """
    name = str(jnp.dtype(dtype))
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype=name,
        param_dtype=name,
    )
    naming, module = LLAMA, Decoder(dataclasses.replace(config, scan=scan))
    tensors = to_torch(naming, _random(_shapes(Decoder(config))))
    like = _shapes(module)
    if quantize not in (None, KEEP):
        like = quantized_shapes(like, naming, parse_quantize(quantize))
    params = to_tree(naming, tensors, like)
    settings = {key: getattr(config, key) for key in _SETTINGS} | {"model_type": "llama"}
    return Pretrained("decoder", module.config, module, params, naming, settings)


def _shapes(module: Decoder) -> Any:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def _random(shapes: Any) -> Any:
    """Draw with NumPy, whose numbers no compiler changes: norms of one, all else N(0, 0.1²)."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.ones(leaf.shape, leaf.dtype)
        return (rng.normal(size=leaf.shape) * 0.1).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


_SETTINGS = (
    *DecoderConfig.REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings"),
)
