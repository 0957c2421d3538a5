"""GGUF's K-quants, super-blocks of 256 numbers whose scales have 6 or 8 bits: Q4_K, Q5_K, Q6_K.

Every product of a float16, a scale and a code has at most 24 significant bits and is exact in
float32, so the values are those of llama.cpp to the bit in whatever order XLA multiplies.
"""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import unpack
from lora_jax.core.quantized.kind import Field, Fields, Kind

BLOCK = 256
_RUN = 32  # numbers that share a scale in Q4_K and Q5_K, and bytes whose halves belong together


def _decode_q45(fields: Fields, axis: int) -> jax.Array:
    """Return `code * (scale * d) - minimum * dmin`, with 8 scales and minima per block."""
    codes = unpack(fields["codes"], 4, axis, _RUN)
    if "high" in fields:
        codes |= unpack(fields["high"], 1, axis, _RUN) << jnp.uint8(4)
    scales, mins = _scales_and_mins(fields["scales"], axis)
    scales = scales.astype(jnp.float32) * fields["d"].astype(jnp.float32)
    mins = mins.astype(jnp.float32) * fields["dmin"].astype(jnp.float32)
    return _by_run(lambda c, s, m: c * s - m, axis, codes, scales, mins)


def _scales_and_mins(packed: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return 8 scales and 8 minima of 6 bits from 12 bytes.

    The first four of each are the low 6 bits of bytes 0 to 3 and 4 to 7. The last four have their
    low 4 bits in the halves of bytes 8 to 11, and their high 2 bits in the rest of the others.
    """
    scales, mins, both = jnp.split(packed, 3, axis)
    low, top, nibble = jnp.uint8(0x3F), jnp.uint8(0x30), jnp.uint8(0x0F)
    two, four = jnp.uint8(2), jnp.uint8(4)
    last = (both & nibble) | ((scales >> two) & top), (both >> four) | ((mins >> two) & top)
    first = scales & low, mins & low
    joined = [jnp.concatenate(pair, axis) for pair in zip(first, last, strict=True)]
    return joined[0], joined[1]


def _decode_q6(fields: Fields, axis: int) -> jax.Array:
    """Return `(code - 32) * (scale * d)`, with 16 scales per block."""
    low = unpack(fields["codes"], 4, axis, 64)
    codes = low | (unpack(fields["high"], 2, axis, 32) << jnp.uint8(4))
    scales = fields["scales"].astype(jnp.float32) * fields["d"].astype(jnp.float32)
    return _by_run(lambda c, s: (c - 32) * s, axis, codes, scales)


def _by_run(
    fn: Callable[..., jax.Array], axis: int, codes: jax.Array, *scales: jax.Array
) -> jax.Array:
    """Return `fn(codes, *scales)` in float32, with each scale for its share of the codes."""
    at, count = axis % codes.ndim, scales[0].shape[axis]
    before, after = codes.shape[:at], codes.shape[at + 1 :]
    runs = codes.astype(jnp.float32).reshape(*before, count, -1, *after)
    return fn(runs, *(jnp.expand_dims(x, at + 1) for x in scales)).reshape(codes.shape)


_SOURCE = "https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h"
_CODES = {"codes": Field(jnp.uint8, Fraction(1, 2))}
_HALF = Field(jnp.float16, None)
_SCALES = {"scales": Field(jnp.uint8, Fraction(12, BLOCK)), "dmin": _HALF, "d": _HALF}
_HIGH = {"high": Field(jnp.uint8, Fraction(1, 8))}
_Q6_SCALES = {"scales": Field(jnp.int8, Fraction(1, 16)), "d": _HALF}

Q4_K = Kind("q4_k", _CODES | _SCALES, BLOCK, _decode_q45, None, _SOURCE)
Q5_K = Kind("q5_k", _CODES | _HIGH | _SCALES, BLOCK, _decode_q45, None, _SOURCE)
Q6_K = Kind(
    "q6_k",
    {**_CODES, "high": Field(jnp.uint8, Fraction(1, 4)), **_Q6_SCALES},
    BLOCK,
    _decode_q6,
    None,
    _SOURCE,
)
