"""How GGUF's blocks of quantized numbers lie in a file: the order of their fields' bytes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.core.quantized.kinds import KINDS

#: The fields of a block in the order of the file, by GGUF's name of the type. Our kind has the same
#: name in lower case.
FIELDS = {
    "Q8_0": ("scales", "codes"),
    "Q4_0": ("scales", "codes"),
    "Q4_1": ("scales", "mins", "codes"),
    "Q5_0": ("scales", "high", "codes"),
    "Q5_1": ("scales", "mins", "high", "codes"),
    "Q4_K": ("d", "dmin", "scales", "codes"),
    "Q5_K": ("d", "dmin", "scales", "high", "codes"),
    "Q6_K": ("codes", "high", "scales", "d"),
}


@dataclass(frozen=True)
class StoredField:
    """One field of a tensor's blocks, which stays in the file until it is read.

    Attributes:
      shape: the tensor's, with the entries of all blocks along the last axis.
      dtype: of the entries.
      blocks: uint8 `[rows, blocks, bytes per block]`, a view into the mapped file.
      start: the first byte of the field in a block.
      check: is given what was read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: np.ndarray
    start: int
    check: Callable[[np.ndarray], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._read(self.blocks).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read a part of the first axis, without the rest."""
        each = math.prod(self.shape[1:-1])
        part = self.blocks[start * each : stop * each]
        return self._read(part).reshape(stop - start, *self.shape[1:])

    def _read(self, blocks: np.ndarray) -> np.ndarray:
        count = math.prod(self.shape) * self.dtype.itemsize // math.prod(self.blocks.shape[:2])
        part = blocks[:, :, self.start : self.start + count]
        return self.check(np.ascontiguousarray(part).view(self.dtype))


def fields(
    name: str,
    shape: tuple[int, ...],
    stored: np.ndarray,
    check: Callable[[np.ndarray], np.ndarray],
) -> Mapping[str, StoredField]:
    """Return the fields of a tensor's blocks.

    Args:
      name: of the type, in `FIELDS`.
      shape: of the tensor; the blocks are along its last axis.
      stored: its bytes.
      check: is given each array that is read, and returns it.
    """
    kind = KINDS[name.lower()]
    block = kind.block or shape[-1]
    blocks = stored.reshape(math.prod(shape[:-1]), shape[-1] // block, -1)
    found, start = {}, 0
    for field_name in FIELDS[name]:
        field = kind.fields[field_name]
        entries = (*shape[:-1], field.entries(shape[-1], block))
        found[field_name] = StoredField(entries, np.dtype(field.dtype), blocks, start, check)
        start += field.entries(block, block) * np.dtype(field.dtype).itemsize
    return {field_name: found[field_name] for field_name in kind.fields}
