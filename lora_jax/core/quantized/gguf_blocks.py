"""GGUF's blocks of 32 numbers, field by field: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

A float16 times a code has at most 18 significant bits, so the product is exact in float32, and the
values are those of llama.cpp to the bit, whether XLA fuses multiplication and addition or not.
"""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import pack, unpack
from lora_jax.core.quantized.kind import Decode, Encode, Field, Fields, Kind

BLOCK = 32
_HALF = BLOCK // 2  # bytes of a block whose low halves come first, then their high halves


def _decode_8(fields: Fields, axis: int) -> jax.Array:
    return fields["codes"].astype(jnp.float32) * fields["scales"].astype(jnp.float32)


def _encode_8(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = _divide(jnp.abs(values).max(axis, keepdims=True), 127)
    codes = values * _reciprocal(scale)
    size = jnp.abs(codes)
    whole = jnp.floor(size)
    whole += size - whole >= 0.5  # halves away from zero
    return {"codes": (jnp.sign(codes) * whole).astype(jnp.int8), "scales": _half(scale)}


def _codes(fields: Fields, axis: int) -> jax.Array:
    """Return codes of 4 bits, or of 5 where there is a field with the highest bits."""
    codes = unpack(fields["codes"], 4, axis, _HALF)
    if "high" in fields:
        codes |= unpack(fields["high"], 1, axis, 1) << jnp.uint8(4)
    return codes.astype(jnp.float32)


def _packed(codes: jax.Array, axis: int, bits: int) -> dict[str, jax.Array]:
    """Return the fields of `_codes`; the codes are cut to integers."""
    codes = codes.astype(jnp.uint8)
    low = {"codes": pack(codes & jnp.uint8(15), 4, axis, _HALF)}
    return low if bits == 4 else {**low, "high": pack(codes >> jnp.uint8(4), 1, axis, 1)}


def _decode_signed(fields: Fields, axis: int) -> jax.Array:
    """Return `(code - half) * scale`, where half of the codes are below `half`."""
    half = 16 if "high" in fields else 8
    return (_codes(fields, axis) - half) * fields["scales"].astype(jnp.float32)


def _encode_signed(values: jax.Array, axis: int, bits: int) -> dict[str, jax.Array]:
    """Give the number of largest absolute value the code 0, which is `-half` steps."""
    half = 2 ** (bits - 1)
    largest = jnp.abs(values).argmax(axis, keepdims=True)
    scale = jnp.take_along_axis(values, largest, axis) / -half
    # Clipped before the addition: XLA cannot fuse it with the product, which would round otherwise.
    codes = jnp.clip(values * _reciprocal(scale), -half, half - 1) + (half + 0.5)
    return {**_packed(codes, axis, bits), "scales": _half(scale)}


def _decode_offset(fields: Fields, axis: int) -> jax.Array:
    """Return `code * scale + minimum`."""
    scaled = _codes(fields, axis) * fields["scales"].astype(jnp.float32)
    return scaled + fields["mins"].astype(jnp.float32)


def _encode_offset(values: jax.Array, axis: int, bits: int) -> dict[str, jax.Array]:
    top = 2**bits - 1
    low = values.min(axis, keepdims=True)
    scale = _divide(values.max(axis, keepdims=True) - low, top)
    codes = jnp.clip((values - low) * _reciprocal(scale), 0, top) + 0.5  # clipped as above
    return {**_packed(codes, axis, bits), "mins": _half(low), "scales": _half(scale)}


def _divide(x: jax.Array, number: int) -> jax.Array:
    """Divide finite numbers exactly; XLA multiplies by the rounded reciprocal of constants."""
    return x / (x - x + number)


def _reciprocal(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16)


_SOURCE = "https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h"
_CODES = {"codes": Field(jnp.uint8, Fraction(1, 2))}
_HIGH = {"high": Field(jnp.uint8, Fraction(1, 8))}
_SCALES = {"scales": Field(jnp.float16, None)}
_MINS = {"mins": Field(jnp.float16, None)}


def _kind(name: str, fields: dict[str, Field], decode: Decode, encode: Encode) -> Kind:
    return Kind(name, fields, BLOCK, decode, encode, _SOURCE)


_signed = lambda bits: partial(_encode_signed, bits=bits)
_offset = lambda bits: partial(_encode_offset, bits=bits)

Q8_0 = _kind("q8_0", {"codes": Field(jnp.int8, 1)} | _SCALES, _decode_8, _encode_8)
Q4_0 = _kind("q4_0", _CODES | _SCALES, _decode_signed, _signed(4))
Q4_1 = _kind("q4_1", _CODES | _MINS | _SCALES, _decode_offset, _offset(4))
Q5_0 = _kind("q5_0", _CODES | _HIGH | _SCALES, _decode_signed, _signed(5))
Q5_1 = _kind("q5_1", _CODES | _HIGH | _MINS | _SCALES, _decode_offset, _offset(5))
