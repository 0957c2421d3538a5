"""NVFP4: four-bit floating numbers (e2m1), an FP8 scale (e4m3) per 16 of them, and a divisor."""

from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized import fp8, mxfp4
from lora_jax.core.quantized.bits import look_up, map_nibbles, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind

_LARGEST = 6.0  # e2m1 number


def _decode(fields: Fields, axis: int) -> jax.Array:
    """Return `VALUES[code] · (scale / divisor)`."""
    values = map_nibbles(lambda codes: look_up(codes, mxfp4.VALUES), fields["codes"], axis)
    return values * (fp8.numbers(fields["scales"]) / fields["divisor"])


def _encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    absmax = jnp.abs(values).max(axis, keepdims=True)
    largest = absmax.max(axis - 1, keepdims=True)
    # the largest scale is the largest FP8 number
    divisor = _LARGEST * fp8.LARGEST / jnp.where(largest > 0, largest, 1)
    scales = fp8.codes(absmax / _LARGEST * divisor)
    step = fp8.numbers(scales) / divisor
    codes = mxfp4.nearest(values / jnp.where(step > 0, step, 1))
    return {"codes": pack_nibbles(codes, axis), "scales": scales, "divisor": divisor}


NVFP4 = Kind(
    "nvfp4",
    {
        "codes": Field(jnp.uint8, Fraction(1, 2)),
        "scales": Field(jnp.uint8, None),
        "divisor": Field(jnp.float32, 0),
    },
    16,
    _decode,
    _encode,
    "Pretraining Large Language Models with NVFP4, https://arxiv.org/abs/2509.25149, section 2",
)
