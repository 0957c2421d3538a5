"""The one place that reads GGUF, llama.cpp's file of a model: settings, tokenizer and tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here,
because the package `gguf` makes an array of every token of a vocabulary (seconds) and believes
every length that a file states; what its blocks of quantized numbers mean is left to it.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, which stays in the file until `np.asarray` asks for its numbers.

    Attributes:
      name: as the file has it: "blk.0.attn_q.weight".
      shape: in numpy's order: a linear layer's weight is `[out, in]`.
      kind: how its numbers are stored: "F32", "Q4_1".
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    stored: np.ndarray  # uint8, a view into the mapped file

    @property
    def dtype(self) -> np.dtype:
        """float32, whatever `kind` is."""
        return np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind]
        block, size = GGML_QUANT_SIZES[kind]
        rows = self.stored.reshape(-1, self.shape[-1] // block * size)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told below
                values = dequantize(rows, kind).reshape(self.shape)
        except NotImplementedError as error:
            raise ModelFileError(f"{self.name}: {self.kind} cannot be read") from error
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.name}: holds numbers that are not finite")
        return values.astype(dtype or np.float32, copy=bool(copy))


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds: `metadata` by key, and `tensors` by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read(path: str | Path) -> GgufFile:
    """Reads the header of a GGUF file and maps its tensors.

    Metadata are Python values: numbers, strings, booleans, lists of strings, and numpy arrays of
    numbers. A tensor's numbers are turned into float32 when they are asked for.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: it is no GGUF file, of another version or byte order, cut short, or says
        what cannot be: the message names the file, and what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise ModelFileError(f"{path} is empty") from error
    try:
        return _parse(data)
    except (ModelFileError, struct.error, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is no whole GGUF file: {error}") from error


def _parse(data: mmap.mmap) -> GgufFile:
    if data[:4] != b"GGUF":
        raise ModelFileError(f"it begins with {data[:4]!r}")
    reader = _Reader(data, 4)
    version = reader.number("I")
    if version not in (2, 3):
        raise ModelFileError(f"version {version} (2 and 3, little-endian, can be read)")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string()
        if key in metadata:
            raise ModelFileError(f"{key} comes twice")
        metadata[key] = reader.value(reader.number("I"))
    headers = [(reader.string(), *reader.tensor()) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(f"general.alignment {alignment!r} is no power of two")
    start = -(-reader.at // alignment) * alignment
    return GgufFile(metadata, {tensor.name: tensor for tensor in _tensors(data, start, headers)})


def _tensors(data: mmap.mmap, start: int, headers: list[tuple]) -> Iterator[GgufTensor]:
    """Checks where the tensors say they lie, in the order in which they lie."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    content, end = np.frombuffer(data, np.uint8), start
    names = set()
    for name, shape, number, offset in sorted(headers, key=lambda header: header[3]):
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ModelFileError(f"{name}: a tensor of the unknown type {number}") from None
        count = int(np.prod(shape, dtype=object))
        if not count or shape[-1] % block:
            raise ModelFileError(f"{name}: shape {shape} is not made of {kind.name}'s blocks")
        first, last = start + offset, start + offset + count // block * size
        if first < end or last > len(data):
            raise ModelFileError(f"{name}: bytes {first} to {last} overlap or end after the file")
        if name in names:
            raise ModelFileError(f"{name} comes twice")
        names.add(name)
        end = last
        yield GgufTensor(name, shape, kind.name, content[first:last])


class _Reader:
    """A place in the file that moves on with what is read."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ModelFileError(f"{length} bytes at {self.at} end after the file")
        self.at += length
        return self.data[self.at - length : self.at]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in _NUMBERS:
            raise ModelFileError(f"metadata of the unknown type {kind} before byte {self.at}")
        return self.number(_NUMBERS[kind])

    def array(self, kind: int, count: int) -> Any:
        if kind == _STRING and count <= len(self.data) // 8:
            return [self.string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ModelFileError(f"an array of {count} values of type {kind} before byte {self.at}")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape in numpy's order, type and offset."""
        axes = self.number("I")
        if not 1 <= axes <= 4:
            raise ModelFileError(f"a tensor of {axes} axes before byte {self.at}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return shape, self.number("I"), self.number("Q")
