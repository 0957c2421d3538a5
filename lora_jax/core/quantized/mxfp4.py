"""MXFP4: four-bit floating numbers (e2m1) times a power of two per 32 of them."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import look_up, map_nibbles, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_POSITIVE, *(-x for x in _POSITIVE))
_LARGEST_EXPONENT = 2  # of an e2m1 number: the largest is 1.5 · 2²
_NAN = 255  # of a scale (e8m0)


def _decode(fields: Fields, axis: int) -> jax.Array:
    """Return `VALUES[code] · 2^(scale - 127)`."""
    values = map_nibbles(lambda codes: look_up(codes, VALUES), fields["codes"], axis)
    # In two factors: 2^-127 alone is subnormal in float32, and XLA may take it for zero.
    first, second = _factors(fields["scales"])
    return values * first * second


def powers_of_two(scales: jax.Array) -> jax.Array:
    """Return the numbers that scales (e8m0) mean, in float32.

    >>> powers_of_two(jnp.array([126, 127, 130], jnp.uint8))
    Array([0.5, 1. , 8. ], dtype=float32)
    """
    first, second = _factors(scales)
    return first * second


def _factors(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    exponents = scales.astype(jnp.int32)
    half = exponents >> 1
    first = jnp.where(exponents == _NAN, jnp.nan, _power_of_two(half - 63))
    return first, _power_of_two(exponents - half - 64)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Return 2^exponent in float32, of an exponent from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    """Return codes and scales by section 6.3 of the specification."""
    largest = jnp.abs(values).max(axis, keepdims=True)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - _LARGEST_EXPONENT
    scales = jnp.maximum(exponent, 0)
    half = scales >> 1
    scaled = values * _power_of_two(63 - half) * _power_of_two(64 - (scales - half))
    return {"codes": pack_nibbles(nearest(scaled), axis), "scales": scales.astype(jnp.uint8)}


def nearest(values: jax.Array) -> jax.Array:
    """Return the code of the nearest e2m1 number: halfway between two, the even code.

    >>> nearest(jnp.array([0.75, -2.5, 9.0]))
    Array([ 2, 12,  7], dtype=uint8)
    """
    codes = jnp.where(jnp.signbit(values), jnp.uint8(8), jnp.uint8(0))
    for code, (low, high) in enumerate(itertools.pairwise(_POSITIVE)):
        middle = (low + high) / 2
        codes += jnp.abs(values) > middle if code % 2 == 0 else jnp.abs(values) >= middle
    return codes


MXFP4 = Kind(
    "mxfp4",
    {"codes": Field(jnp.uint8, Fraction(1, 2)), "scales": Field(jnp.uint8, None)},
    32,
    _decode,
    _encode,
    "OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 6.3",
)
