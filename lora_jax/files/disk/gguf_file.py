"""Read GGUF, llama.cpp's model file (settings, tokenizer, tensors); the only place that does.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. We read the header ourselves,
because the package `gguf` makes one array per token of a vocabulary (which takes seconds) and
trusts every length in the file. We leave it to `gguf` to decode the blocks of quantized numbers.
"""

import contextlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.disk import gguf_blocks, gguf_schema

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, which stays in the file until `np.asarray` reads its numbers.

    Attributes:
      name: in the file: "blk.0.attn_q.weight".
      shape: in NumPy's order: a linear layer's weight is `[out, in]`.
      kind: the storage type of its numbers: "F32", "Q4_1".
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
        return self._decode(self.stored, self.shape).astype(dtype or np.float32, copy=bool(copy))

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers are in blocks that share scales."""
        return self.kind not in ("F32", "F16", "BF16", "F64")

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of floating numbers in the file; float32 for quantized numbers."""
        return np.dtype({"F16": "float16", "BF16": "bfloat16"}.get(self.kind, "float32"))

    def codes(self) -> QuantizedWeight | None:
        """Return the quantized numbers as they are in the file; None if a kind for them is missing.

        The blocks lie along the last axis. A field is read by `np.asarray` or its method `rows`.
        """
        if self.kind not in gguf_blocks.FIELDS:
            return None
        fields = gguf_blocks.fields(self.kind, self.shape, self.stored, self._finite)
        return QuantizedWeight(fields, self.kind.lower(), -1, self.dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read a part of the first axis, without the rest; the last axis is always read whole."""
        if len(self.shape) == 1:
            return np.asarray(self)[start:stop]
        stored = self.stored.reshape(self.shape[0], -1)[start:stop]
        return self._decode(stored, (stop - start, *self.shape[1:]))

    def _decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind]
        block, size = GGML_QUANT_SIZES[kind]
        rows = stored.reshape(-1, shape[-1] // block * size)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                values = dequantize(rows, kind).reshape(shape)
        except NotImplementedError as error:
            raise ModelFileError(
                f"{shown(self.name)}: type {self.kind} is not supported"
            ) from error
        return self._finite(values)

    def _finite(self, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise ModelFileError(f"{shown(self.name)}: contains NaN or infinite values")
        return values


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file: `metadata` by key, and `tensors` by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file and map its tensors.

    Metadata are Python values: numbers, strings, booleans, lists of strings, and NumPy arrays of
    numbers. A tensor's numbers are converted to float32 when they are read.

    Raises:
      FileNotFoundError: the file does not exist.
      ModelFileError: it is not a GGUF file, has another version or byte order, is truncated or
        inconsistent. The message names the file and what is wrong.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise ModelFileError(f"{path}: the file is empty") from error
    try:
        return _parse(data)
    except (ModelFileError, struct.error, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: not a complete GGUF file: {error}") from error


def general_type(path: str | Path) -> str | None:
    """Return what a GGUF file says that it is, such as "adapter"; None for what says nothing.

    Only the keys before the tokenizer's are read, which are many. A damaged file says nothing.
    """
    with Path(path).open("rb") as file, contextlib.suppress(ValueError, struct.error, OSError):
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(data, 16)
        for _ in range(reader.number("Q")):
            key = reader.string()
            if key.startswith("tokenizer."):
                return None
            value = reader.value(reader.number("I"))
            if key == "general.type":
                return value if isinstance(value, str) else None
    return None


def _parse(data: mmap.mmap) -> GgufFile:
    if data[:4] != b"GGUF":
        raise ModelFileError(f"it starts with {data[:4]!r}")
    reader = _Reader(data, 4)
    version = reader.number("I")
    if version not in (2, 3):
        raise ModelFileError(f"version {version} is not supported, only 2 and 3, little-endian")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string()
        if key in metadata:
            raise ModelFileError(f"the key {shown(key)} appears twice")
        metadata[key] = reader.value(reader.number("I"))
    headers = [(reader.string(), *reader.tensor()) for _ in range(tensors)]
    gguf_schema.check(metadata, gguf_schema.GENERAL)
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    return GgufFile(metadata, {tensor.name: tensor for tensor in _tensors(data, start, headers)})


def _tensors(data: mmap.mmap, start: int, headers: list[tuple]) -> Iterator[GgufTensor]:
    """Check where the tensors are, and yield them in the order of their offsets."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    content, end = np.frombuffer(data, np.uint8), start
    names = set()
    for name, shape, number, offset in sorted(headers, key=lambda header: header[3]):
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ModelFileError(f"{shown(name)}: unknown tensor type {number}") from None
        count = int(np.prod(shape, dtype=object))
        if not count or shape[-1] % block:
            raise ModelFileError(
                f"{shown(name)}: shape {shape} does not fit {kind.name}'s block size"
            )
        first, last = start + offset, start + offset + count // block * size
        if first < end or last > len(data):
            raise ModelFileError(
                f"{shown(name)}: bytes {first} to {last} overlap or exceed the file"
            )
        if name in names:
            raise ModelFileError(f"the tensor {shown(name)} appears twice")
        names.add(name)
        end = last
        yield GgufTensor(name, shape, kind.name, content[first:last])


class _Reader:
    """A position in the file that advances with each read."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ModelFileError(f"{length} bytes at {self.at} exceed the file")
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
            raise ModelFileError(f"metadata of unknown type {kind} before byte {self.at}")
        return self.number(_NUMBERS[kind])

    def array(self, kind: int, count: int) -> Any:
        if kind == _STRING and count <= len(self.data) // 8:
            return [self.string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ModelFileError(f"an array of {count} values of type {kind} before byte {self.at}")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Read one tensor's shape in NumPy's order, its type and its offset."""
        axes = self.number("I")
        if not 1 <= axes <= 4:
            raise ModelFileError(f"a tensor of {axes} axes before byte {self.at}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return shape, self.number("I"), self.number("Q")
