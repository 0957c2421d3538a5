"""Tensors that a file stores as codes: read when they are asked for, as codes or as values."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array

#: What to do about a tensor whose codes cannot be kept.
INSTEAD = 'pass dtype= without quantize="keep" to read it as floats'

_dequantize = jax.jit(dequantize_array)


@dataclass(frozen=True)
class LazyArray:
    """An array of known shape and dtype that `np.asarray` reads."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.asarray(self.read())
        assert values.shape == self.shape, (values.shape, self.shape)
        return values.astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class StoredCodes:
    """A tensor that a file stores as codes, under the name and with the axes of the weight.

    Attributes:
      name: of the weight.
      shape: of the weight.
      dtype: of the weight, as the file declares it.
      keep: returns its codes, of fields that `np.asarray` reads.
      values: returns its values in float32; by default those of the codes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    keep: Callable[[], QuantizedWeight]
    values: Callable[[], np.ndarray] | None = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def codes(self) -> QuantizedWeight:
        """Return the codes, of fields that `np.asarray` reads.

        Raises:
          ModelFileError: no kind of `QuantizedWeight` means the same.
        """
        return self.keep()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.values() if self.values else dequantized(self.keep())
        return values if dtype is None else values.astype(dtype, copy=False)


def replace_parts(
    tensors: Mapping[str, Any],
    parts: Sequence[str],
    weight: str,
    make: Callable[[str], StoredCodes],
) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts.

    Args:
      tensors: by name.
      parts: how the names of the parts end; each weight has the first of them.
      weight: how the name of the weight ends instead.
      make: returns the weight whose parts' names begin like this.
    """
    stems = [name.removesuffix(parts[0]) for name in tensors if name.endswith(parts[0])]
    gone = {stem + end for stem in stems for end in parts}
    rest = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return rest | {stem + weight: make(stem) for stem in stems}


def dequantized(codes: QuantizedWeight) -> np.ndarray:
    """Return the values of codes in float32, computed on the host."""
    fields = {name: np.asarray(x) for name, x in codes.fields.items()}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = dataclasses.replace(codes, fields=fields, dtype=jnp.dtype("float32"))
        return np.asarray(_dequantize(wide))


def part(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...], dtypes: str) -> Any:
    """Return one of the tensors of a quantized weight.

    Args:
      tensors: of the file.
      name: of the tensor.
      shape: that it should have; -1 for any size.
      dtypes: that it may have, such as "int32 uint8".

    Raises:
      ModelFileError: it is missing, or has another shape or dtype.
    """
    if name not in tensors:
        raise ModelFileError(f"{shown(name)}: missing, a part of a quantized weight")
    found = tensors[name]
    fits = len(found.shape) == len(shape) and all(
        size in (-1, n) for size, n in zip(shape, found.shape, strict=True)
    )
    if not fits or str(found.dtype) not in dtypes.split():
        sizes = ", ".join("any" if n == -1 else str(n) for n in shape)
        raise ModelFileError(
            f"{shown(name)}: is {found.dtype} {list(found.shape)}, but this part of a quantized "
            f"weight should be {dtypes.replace(' ', ' or ')} [{sizes}]"
        )
    return found


def bytes_of(tensor: Any) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
