"""NF4, the 4-bit format of QLoRA, with 8-bit scales or float32 ones."""

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import look_up, map_nibbles, nearest, pack_nibbles
from lora_jax.core.quantized.kind import Field, Fields, Kind

# QLoRA, https://arxiv.org/abs/2305.14314, appendix E: quantiles of a normal distribution in
# [-1, 1], eight of them negative (with -1), zero, and seven positive (with 1).
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

BLOCK = 64


def _decode(fields: Fields, axis: int) -> jax.Array:
    """Return `VALUES[code] · absmax`, absmax = `largest · (scale / 255)²`."""
    values = map_nibbles(lambda codes: look_up(codes, VALUES), fields["codes"], axis)
    return values * _absmax(fields["scales"], fields["largest"])


def _absmax(scales: jax.Array, largest: jax.Array) -> jax.Array:
    # A square, so that a block a hundred times smaller than the largest still has 25 steps.
    return jnp.square(scales.astype(jnp.float32)) * (largest / 255**2)


def _encode(values: jax.Array, axis: int) -> dict[str, jax.Array]:
    absmax = jnp.abs(values).max(axis, keepdims=True)
    largest = absmax.max(axis - 1, keepdims=True)
    ratio = absmax / jnp.where(largest > 0, largest, 1)
    scales = jnp.round(jnp.sqrt(ratio) * 255).astype(jnp.uint8)
    codes = absmax_codes(values, _absmax(scales, largest), VALUES)
    return {"codes": pack_nibbles(codes, axis), "scales": scales, "largest": largest}


def absmax_codes(values: jax.Array, absmax: jax.Array, table: Sequence[float]) -> jax.Array:
    """Return the code of the nearest number of the table times `absmax`."""
    return nearest(values / jnp.where(absmax > 0, absmax, 1), table)


NF4 = Kind(
    "nf4",
    {
        "codes": Field(jnp.uint8, Fraction(1, 2)),
        "scales": Field(jnp.uint8, None),
        "largest": Field(jnp.float32, 0),
    },
    BLOCK,
    _decode,
    _encode,
    "QLoRA, https://arxiv.org/abs/2305.14314",
)
