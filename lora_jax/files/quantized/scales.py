"""Scales of any shape in a file, as one per output and per block of inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.core.checks import is_size
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.quantized.groups import Groups, regular
from lora_jax.files.quantized.stored import LazyArray, part

#: The dtypes of scales.
FLOATS = "float32 bfloat16 float16"


@dataclass(frozen=True)
class Grid:
    """Where the scales of a weight `[out, in]` are in a file's array.

    Attributes:
      shape: of the array, with two axes.
      rows: of the array, for each output.
      groups: of the inputs, which are the array's columns.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    groups: Groups

    def spread(self, array: Any, dtype: Any = None) -> LazyArray:
        """Return an array of the file as `[out, blocks]`."""

        def read() -> np.ndarray:
            found = np.asarray(array).reshape(self.shape)
            return found[self.rows][:, self.groups.index]

        return LazyArray((self.rows.size, self.groups.index.size), dtype or array.dtype, read)


def grid(
    tensors: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    square: Sequence[int] | None = None,
) -> Grid:
    """Return where the scales of a weight are.

    Args:
      tensors: of the file.
      name: of the scales: `[]`, `[1]`, `[out]`, `[out, 1]`, `[out, groups]`, or with square blocks
        one per block.
      shape: of the weight, `[out, in]`.
      square: height and width of square blocks; None where every output has its scales.

    Raises:
      ModelFileError: the shape of the scales is none of these.
    """
    out, size = shape
    scales = part(tensors, name, (-1,) * len(tensors[name].shape), FLOATS)
    rows, columns = (*scales.shape, 1, 1)[:2]
    if rows * columns == 1 and len(scales.shape) <= 2 and not square:
        return Grid((1, 1), np.zeros(out, int), regular(size, size))
    if square is not None:
        if not isinstance(square, list) or len(square) != 2 or not all(map(is_size, square)):
            raise ModelFileError(f"blocks of {shown_value(square)} are not a height and a width")
        high, wide = square
        if (rows, columns) == (-(-out // high), -(-size // wide)):
            return Grid((rows, columns), np.arange(out) // high, regular(size, wide))
    elif len(scales.shape) <= 2 and rows == out and columns and size % columns == 0:
        return Grid((rows, columns), np.arange(out), regular(size, size // columns))
    blocks = f" in blocks of {list(square)}" if square else ""
    raise ModelFileError(
        f"{shown(name)}: scales {list(scales.shape)} do not fit a weight {list(shape)}{blocks}"
    )
