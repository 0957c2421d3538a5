"""Integers with a zero point: (code - zero) times a scale, per group of weights."""

from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import map_nibbles, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind


def _encode(values: jax.Array, axis: int, largest: int) -> dict[str, jax.Array]:
    """Return codes from 0 to `largest`, where zero itself is among the values."""
    low = jnp.minimum(values.min(axis, keepdims=True), 0)
    high = jnp.maximum(values.max(axis, keepdims=True), 0)
    scales = ((high - low) / largest).astype(jnp.float16)
    step = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
    zeros = jnp.clip(jnp.round(-low / step), 0, largest)
    codes = jnp.clip(jnp.round(values / step) + zeros, 0, largest)
    return {"codes": codes.astype(jnp.uint8), "scales": scales, "zeros": zeros.astype(jnp.uint8)}


def _decode(codes: jax.Array, fields: Fields) -> jax.Array:
    steps = codes.astype(jnp.float32) - fields["zeros"].astype(jnp.float32)
    return steps * fields["scales"].astype(jnp.float32)


def _decode_4(fields: Fields, axis: int) -> jax.Array:
    return map_nibbles(lambda codes: _decode(codes, fields), fields["codes"], axis)


def _encode_4(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    fields = _encode(values, axis, 15)
    return fields | {"codes": pack_nibbles(fields["codes"], axis)}


def _decode_8(fields: Fields, axis: int) -> jax.Array:
    return _decode(fields["codes"], fields)


def _encode_8(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    return _encode(values, axis, 255)


_PER_BLOCK = {"scales": Field(jnp.float16, None), "zeros": Field(jnp.uint8, None)}
_FIELDS_4 = {"codes": Field(jnp.uint8, Fraction(1, 2)), **_PER_BLOCK}
_FIELDS_8 = {"codes": Field(jnp.uint8, 1), **_PER_BLOCK}
_SOURCE = "GPTQ, https://arxiv.org/abs/2210.17323, section 4: asymmetric, per group"

INT4_ZERO = Kind("int4_zero", _FIELDS_4, 128, _decode_4, _encode_4, _SOURCE)
INT8_ZERO = Kind("int8_zero", _FIELDS_8, 128, _decode_8, _encode_8, _SOURCE)
