"""Tables of 16 values times a float32 scale per block, as bitsandbytes has them."""

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized import nf4
from lora_jax.core.quantized.bits import look_up, map_nibbles, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind

#: Two bits of exponent and one of mantissa after the sign, as bitsandbytes' `get_4bit_type`:
#: multiples of 1/12, and 1/192 in the place of a subnormal number.
FP4_VALUES = tuple(
    sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

_FIELDS = {"codes": Field(jnp.uint8, Fraction(1, 2)), "scales": Field(jnp.float32, None)}


def _kind(name: str, table: Sequence[float], source: str) -> Kind:
    def decode(fields: Fields, axis: int) -> jax.Array:
        values = map_nibbles(lambda codes: look_up(codes, table), fields["codes"], axis)
        return values * fields["scales"].astype(jnp.float32)

    def encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
        absmax = jnp.abs(values).max(axis, keepdims=True)
        codes = nf4.absmax_codes(values, absmax, table)
        return {"codes": pack_nibbles(codes, axis), "scales": absmax}

    return Kind(name, _FIELDS, nf4.BLOCK, decode, encode, source)


NF4_FLOAT32 = _kind("nf4_float32", nf4.VALUES, "QLoRA, without double quantization")
FP4 = _kind("fp4", FP4_VALUES, "bitsandbytes 0.50.2, functional.get_4bit_type")
