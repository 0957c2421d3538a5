"""Integers times a scale: 8 bits per output or per block, 4 bits per block."""

from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import map_nibbles, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind


def _scale_of(values: jax.Array, axis: int, steps: int) -> jax.Array:
    """Return the size of a step, so that the largest number of a block is `steps` of them."""
    return jnp.abs(values).max(axis, keepdims=True) / steps


def _round(values: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(values / jnp.where(scale > 0, scale, 1))


def _decode_8(fields: Fields, axis: int) -> jax.Array:
    return fields["codes"].astype(jnp.float32) * fields["scales"]


def _encode_8(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = _scale_of(values, axis, 127)
    return {"codes": _round(values, scale).astype(jnp.int8), "scales": scale}


def _decode_4(fields: Fields, axis: int) -> jax.Array:
    codes = map_nibbles(lambda c: c.astype(jnp.float32) - 8, fields["codes"], axis)
    return codes * fields["scales"].astype(jnp.float32)


def _encode_4(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = _scale_of(values, axis, 7).astype(jnp.float16)
    codes = jnp.clip(_round(values, scale.astype(jnp.float32)), -7, 7) + 8
    return {"codes": pack_nibbles(codes, axis), "scales": scale}


_SOURCE = "absmax, LLM.int8(), https://arxiv.org/abs/2208.07339, section 2.1"
_CODES_8, _SCALES_8 = Field(jnp.int8, 1), Field(jnp.float32, None)
_FIELDS_8 = {"codes": _CODES_8, "scales": _SCALES_8}
_FIELDS_4 = {"codes": Field(jnp.uint8, Fraction(1, 2)), "scales": Field(jnp.float16, None)}

INT8 = Kind("int8", _FIELDS_8, None, _decode_8, _encode_8, _SOURCE)
INT8_BLOCK = Kind("int8_block", _FIELDS_8, 128, _decode_8, _encode_8, _SOURCE)
INT4 = Kind("int4", _FIELDS_4, 32, _decode_4, _encode_4, _SOURCE)
