"""NF4 as bitsandbytes quantizes it twice: the scale of 64 numbers is an 8-bit code itself."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.quantized import nf4
from lora_jax.core.quantized.bits import look_up, unpack
from lora_jax.core.quantized.kind import Field, Fields, Kind

_RUN = nf4.BLOCK // 2  # bytes of the numbers that share a scale


def dynamic_map() -> np.ndarray:
    """Return the 256 values of a scale's code, as bitsandbytes' `create_dynamic_map` makes them.

    Dynamic tree quantization, https://arxiv.org/abs/1511.04561: seven decades, of which each has
    twice as many numbers as the one below. They are equal to the bit, because the ends of the
    intervals are rounded as `torch.linspace` rounds them.
    """
    positive: list[np.ndarray] = []
    for decade in range(7):
        count = 2**decade
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(count))
        k = np.arange(count + 1)
        ends = np.where(k < (count + 1) // 2, np.float32(0.1) + step * k, 1 - step * (count - k))
        ends = ends.astype(np.float32)
        positive.append(np.float32(10.0 ** (decade - 6)) * ((ends[:-1] + ends[1:]) / 2))
    found = np.concatenate(positive)
    return np.sort(np.concatenate([-found, np.array([0, 1], np.float32), found]))


def _decode(fields: Fields, axis: int) -> jax.Array:
    """Return `VALUES[code] · (map[scale] · nested + offset)`, one scale for 64 codes."""
    codes = unpack(fields["codes"], 4, axis, _RUN)
    table = jnp.asarray(dynamic_map())
    scales = table[fields["scales"]] * fields["nested"] + fields["offset"]
    at = axis % codes.ndim
    runs = codes.reshape(*codes.shape[:at], -1, nf4.BLOCK, *codes.shape[at + 1 :])
    return (look_up(runs, nf4.VALUES) * jnp.expand_dims(scales, at + 1)).reshape(codes.shape)


NF4_NESTED = Kind(
    "nf4_nested",
    {
        "codes": Field(jnp.uint8, Fraction(1, 2)),
        "scales": Field(jnp.uint8, Fraction(1, nf4.BLOCK)),
        "nested": Field(jnp.float32, None),
        "offset": Field(jnp.float32, 0),
    },
    nf4.BLOCK * 256,
    _decode,
    None,
    "bitsandbytes 0.50.2, functional.dequantize_4bit with a nested state",
)
