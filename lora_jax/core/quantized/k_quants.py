"""GGUF's K-quants, super-blocks of 256 numbers whose scales have 6 or 8 bits: Q4_K, Q5_K, Q6_K.

Every product of a float16, a scale and a code has at most 24 significant bits and is exact in
float32, so the values are those of llama.cpp to the bit in whatever order XLA multiplies. Codes
that are written here are not those that llama.cpp would choose, but as good.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import pack, unpack
from lora_jax.core.quantized.grid_search import (
    furthest_from_0,
    scale_and_minimum,
    signed_scale,
)
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


def _encode_q45(values: jax.Array, axis: int, bits: int) -> dict[str, jax.Array]:
    """Return the fields of `_decode_q45`; how scales are chosen is said in `grid_search`."""
    top = 2**bits - 1
    runs = _runs(values, axis, BLOCK // _RUN)
    scale, least = scale_and_minimum(runs, top, axis)
    d, scales = _six_bits(scale, axis)
    # A run beside a far larger one has steps of 0: all of its numbers are then its minimum.
    mean = jnp.minimum(runs.mean(axis, keepdims=True), 0)
    least = jnp.where(scales == 0, mean, least)
    dmin, mins = _six_bits(-least, axis)
    steps, low = (x.astype(jnp.float32) * y for x, y in ((d, scales), (dmin, mins)))
    codes = _nearest(runs + low, steps, 0, top).astype(jnp.uint8).reshape(values.shape)
    packed = {"codes": pack(codes & jnp.uint8(15), 4, axis, _RUN)}
    if bits == 5:
        packed["high"] = pack(codes >> jnp.uint8(4), 1, axis, _RUN)
    squeeze = lambda x: jnp.squeeze(x, axis)
    scales_and_mins = _pack_scales(squeeze(scales), squeeze(mins), axis)
    return {**packed, "scales": scales_and_mins, "dmin": squeeze(dmin), "d": squeeze(d)}


def _six_bits(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return a float16 per block and an integer up to 63 per run, whose products are near `x`."""
    d = x.max(axis - 1, keepdims=True) / 63
    return d.astype(jnp.float16), _nearest(x, d, 0, 63)


def _pack_scales(scales: jax.Array, mins: jax.Array, axis: int) -> jax.Array:
    """Return 12 bytes; the inverse of `_scales_and_mins`."""
    (s, s_last), (m, m_last) = (jnp.split(x.astype(jnp.uint8), 2, axis) for x in (scales, mins))
    four, nibble = jnp.uint8(4), jnp.uint8(0x0F)
    high = lambda x: (x >> four) << jnp.uint8(6)
    both = (s_last & nibble) | (m_last << four)
    return jnp.concatenate([s | high(s_last), m | high(m_last), both], axis)


def _decode_q6(fields: Fields, axis: int) -> jax.Array:
    """Return `(code - 32) * (scale * d)`, with 16 scales per block."""
    low = unpack(fields["codes"], 4, axis, 64)
    codes = low | (unpack(fields["high"], 2, axis, 32) << jnp.uint8(4))
    scales = fields["scales"].astype(jnp.float32) * fields["d"].astype(jnp.float32)
    return _by_run(lambda c, s: (c - 32) * s, axis, codes, scales)


def _encode_q6(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    """Return the fields of `_decode_q6`; how scales are chosen is said in `grid_search`."""
    runs = _runs(values, axis, 16)
    scale = signed_scale(runs, 32, axis)
    largest = furthest_from_0(scale, axis - 1) / -128
    d = largest.astype(jnp.float16)
    scales = _nearest(scale, largest, -128, 127)
    codes = _nearest(runs, d.astype(jnp.float32) * scales, -32, 31) + 32
    codes = codes.astype(jnp.uint8).reshape(values.shape)
    squeeze = lambda x: jnp.squeeze(x, axis)
    return {
        "codes": pack(codes & jnp.uint8(15), 4, axis, 64),
        "high": pack(codes >> jnp.uint8(4), 2, axis, 32),
        "scales": squeeze(scales).astype(jnp.int8),
        "d": squeeze(d),
    }


def _nearest(x: jax.Array, step: jax.Array, least: int, most: int) -> jax.Array:
    """Return the number of steps nearest to `x`, within limits; 0 where a step is 0."""
    steps = jnp.round(x / jnp.where(step == 0, 1, step))
    return jnp.where(step == 0, 0, jnp.clip(steps, least, most))


def _runs(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Return `[..., size, ...]` as `[..., count, size / count, ...]`."""
    at = axis % x.ndim
    return x.reshape(*x.shape[:at], count, -1, *x.shape[at + 1 :])


def _by_run(
    fn: Callable[..., jax.Array], axis: int, codes: jax.Array, *scales: jax.Array
) -> jax.Array:
    """Return `fn(codes, *scales)` in float32, with each scale for its share of the codes."""
    at = axis % codes.ndim
    runs = _runs(codes.astype(jnp.float32), axis, scales[0].shape[axis])
    return fn(runs, *(jnp.expand_dims(x, at + 1) for x in scales)).reshape(codes.shape)


_SOURCE = "https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h"
_CODES = {"codes": Field(jnp.uint8, Fraction(1, 2))}
_HALF = Field(jnp.float16, None)
_SCALES = {"scales": Field(jnp.uint8, Fraction(12, BLOCK)), "dmin": _HALF, "d": _HALF}
_HIGH = {"high": Field(jnp.uint8, Fraction(1, 8))}
_Q6_SCALES = {"scales": Field(jnp.int8, Fraction(1, 16)), "d": _HALF}

_encode = lambda bits: partial(_encode_q45, bits=bits)

Q4_K = Kind("q4_k", _CODES | _SCALES, BLOCK, _decode_q45, _encode(4), _SOURCE)
Q5_K = Kind("q5_k", _CODES | _HIGH | _SCALES, BLOCK, _decode_q45, _encode(5), _SOURCE)
Q6_K = Kind(
    "q6_k",
    {**_CODES, "high": Field(jnp.uint8, Fraction(1, 4)), **_Q6_SCALES},
    BLOCK,
    _decode_q6,
    _encode_q6,
    _SOURCE,
)
