"""FP8 of four bits of exponent and three of mantissa (e4m3), times a float32 scale."""

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.kind import Field, Fields, Kind

#: The largest number. e4m3 has no infinity: a larger number would become NaN.
LARGEST = 448.0


def numbers(codes: jax.Array) -> jax.Array:
    """Return FP8 numbers in float32.

    In memory they are bytes, because XLA's CPU backend keeps arrays of FP8 as wider ones.

    >>> numbers(jnp.array([0x38, 0xC0, 0x7E], jnp.uint8))
    Array([  1.,  -2., 448.], dtype=float32)
    """
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def codes(values: jax.Array) -> jax.Array:
    """Return the bytes of the nearest FP8 numbers, of which the largest is 448."""
    clipped = jnp.clip(values, -LARGEST, LARGEST)
    return jax.lax.bitcast_convert_type(clipped.astype(jnp.float8_e4m3fn), jnp.uint8)


def _decode(fields: Fields, axis: int) -> jax.Array:
    return numbers(fields["codes"]) * fields["scales"].astype(jnp.float32)


def _encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = jnp.abs(values).max(axis, keepdims=True) / LARGEST
    return {"codes": codes(values / jnp.where(scale > 0, scale, 1)), "scales": scale}


_FIELDS = {"codes": Field(jnp.uint8, 1), "scales": Field(jnp.float32, None)}
_SOURCE = "FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, table 1"

FP8 = Kind("fp8", _FIELDS, None, _decode, _encode, _SOURCE)
FP8_BLOCK = Kind("fp8_block", _FIELDS, 128, _decode, _encode, _SOURCE)
