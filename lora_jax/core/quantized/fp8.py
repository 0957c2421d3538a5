"""FP8 of four bits of exponent and three of mantissa (e4m3), times a float32 scale."""

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.kind import Field, Fields, Kind

#: The largest number. e4m3 has no infinity: a larger number would become NaN.
LARGEST = 448.0


def _decode(fields: Fields, axis: int) -> jax.Array:
    # In memory the codes are bytes: XLA's CPU backend keeps arrays of FP8 as wider ones.
    numbers = jax.lax.bitcast_convert_type(fields["codes"], jnp.float8_e4m3fn)
    return numbers.astype(jnp.float32) * fields["scales"].astype(jnp.float32)


def _encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = jnp.abs(values).max(axis, keepdims=True) / LARGEST
    numbers = jnp.clip(values / jnp.where(scale > 0, scale, 1), -LARGEST, LARGEST)
    codes = jax.lax.bitcast_convert_type(numbers.astype(jnp.float8_e4m3fn), jnp.uint8)
    return {"codes": codes, "scales": scale}


_FIELDS = {"codes": Field(jnp.uint8, 1), "scales": Field(jnp.float32, None)}
_SOURCE = "FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, table 1"

FP8 = Kind("fp8", _FIELDS, None, _decode, _encode, _SOURCE)
FP8_BLOCK = Kind("fp8_block", _FIELDS, 128, _decode, _encode, _SOURCE)
