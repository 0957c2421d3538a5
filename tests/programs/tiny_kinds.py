"""Kinds of quantized numbers with blocks so small that they divide the weights of the programs."""

import dataclasses

from lora_jax.core.quantized.integers import INT4, INT8, INT8_BLOCK
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.nf4 import NF4

TINY = {
    "int8": INT8,  # one block, of any size
    "tiny_int8": dataclasses.replace(INT8_BLOCK, name="tiny_int8", block=1),
    "tiny_int4": dataclasses.replace(INT4, name="tiny_int4", block=2),  # packed
    "tiny_nf4": dataclasses.replace(NF4, name="tiny_nf4", block=2),  # with one number per axis
}
KINDS.update(TINY)


def fitting(size: int) -> list[str]:
    """Return the kinds whose blocks divide an axis of this size."""
    return [name for name, kind in TINY.items() if size % (kind.block or size) == 0]
