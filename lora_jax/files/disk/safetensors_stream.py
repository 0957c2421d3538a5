"""Safetensors files that are written one tensor after the other: memory is that of a part."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.files.disk import safetensors_file

_ALIGNMENT = 8  # bytes: of the header, as the format's own library pads it


class Tensor(Protocol):
    """A tensor whose values are made when `blocks` asks for them."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def blocks(self) -> Iterable[np.ndarray]:
        """Yield its values in row-major order, in parts of any shape."""


@dataclass(frozen=True)
class InMemory:
    """An array as a `Tensor`."""

    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.values.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the whole array."""
        yield np.asarray(self)


@dataclass(frozen=True)
class SafetensorsStream:
    """The content of a file; calling it with an open file writes it there.

    Args:
      tensors: by name; each is asked once for its values, in the order of the file.
      metadata: strings by name.
      source: names the file in errors.

    >>> import io
    >>> file = io.BytesIO()
    >>> SafetensorsStream({"x": InMemory(np.arange(3))}, {"note": "mine"})(file)
    >>> safetensors_file.decode(file.getvalue(), "here")
    ({'x': array([0, 1, 2])}, {'note': 'mine'})
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    source: str = "safetensors"

    def __call__(self, file: BinaryIO) -> None:
        """Write the file's bytes.

        Raises:
          AdapterFileError: `safetensors_file.read` would reject the file, or a tensor yields
            another dtype or number of values than it says.
        """
        safetensors_file.refuse_unwritable(self.source, self.tensors, self.metadata)
        order = safetensors_file.in_file_order(self.tensors)
        file.write(self._header(order))
        for name in order:
            tensor, written = self.tensors[name], 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise AdapterFileError(
                        f"{self.source}: {shown(name)} is {block.dtype}, not {tensor.dtype}"
                    )
                values = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                file.write(values.data)
                written += values.nbytes
            if written != size_of(tensor):
                raise AdapterFileError(
                    f"{self.source}: {shown(name)} has {written} bytes, not {size_of(tensor)}"
                )

    def _header(self, order: Iterable[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for name in order:
            tensor = self.tensors[name]
            stop = start + size_of(tensor)
            header[name] = {
                "dtype": safetensors_file.name_of_dtype(tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        if len(text) > safetensors_file.MAX_HEADER:
            raise AdapterFileError(
                f"{self.source}: cannot be written: the header would exceed 32 MiB"
            )
        return len(text).to_bytes(8, "little") + text


def size_of(tensor: Tensor) -> int:
    """Return a tensor's bytes."""
    return int(np.prod(tensor.shape, dtype=object)) * tensor.dtype.itemsize


def to_bytes(write: Callable[[BinaryIO], None]) -> bytes:
    """Return what a stream writes."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()
