"""Read and write safetensors files strictly; the only place that does. Never reads a pickle."""

import dataclasses
import io
import math
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save as serialize

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.files.disk.strict_json import lines, parse_json

#: The supported dtypes by their names in safetensors.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}")
        for kind in "IU"
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: From the last in a file to the first, as in safetensors' own library.
_ORDER = [
    _DTYPES[name]
    for name in (
        *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16"),
        *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
    )
]

#: Maximum size of a header in bytes, enough for 250,000 tensors.
MAX_HEADER = 2**25
MAX_NAME = 1024
_FIELDS = ("dtype", "shape", "data_offsets")
_FOREIGN = {
    rb"PK\x03\x04|\x80[\x00-\x05]": "a PyTorch pickle, which can run arbitrary code when read: "
    "convert it to safetensors first (in PyTorch, if you trust its source: "
    "safetensors.torch.save_file(torch.load(file), ...))",
    rb"GGUF": "a GGUF file",
    rb"version https://git-lfs": "a Git LFS pointer to it: fetch the file with `git lfs pull`",
    rb"\s*<(!DOCTYPE|!doctype|html)": "a web page",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the header of a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes, relative to the end of the header
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a file: its tensors without their values, and the metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read(
    path: str | os.PathLike, *, finite: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors of a safetensors file by name, and its metadata.

    The header is checked before anything else is read: the file may be truncated, damaged or
    hostile, and the result is the error below and nothing else. These are rejected: a header that
    exceeds the file or 32 MiB, is not a JSON object, or names something twice; offsets that
    overlap, leave gaps, or do not end with the file; shapes that do not match the size; unknown
    dtypes; metadata that is not strings; names that could be mistaken for paths out of a directory,
    contain control characters, or are longer than 1,024 characters.

    Args:
      path: the file.
      finite: reject files with NaN or infinite values.

    Returns:
      Arrays with the file's dtypes, 16-bit ones too (`ml_dtypes.bfloat16`), and the metadata.

    Raises:
      AdapterFileError: any of the above, one line per tensor; or the file does not exist, or is
        something else (a pickle, which is never read).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/a.safetensors", {"x": np.arange(3)}, {"note": "mine"})
    ...     read(f"{folder}/a.safetensors")
    ({'x': array([0, 1, 2])}, {'note': 'mine'})
    """
    with _open(path) as file:
        return _read(file, str(path), finite)


def decode(
    data: bytes, source: str, *, finite: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the bytes of a file, as `read` does; `source` names the file in errors."""
    return _read(io.BytesIO(data), source, finite)


def headers(path: str | os.PathLike) -> Header:
    """Read the names, dtypes and shapes of a file's tensors, and its metadata, but no values.

    Raises:
      AdapterFileError: as `read`.
    """
    with _open(path) as file:
        return _header(file, str(path))[0]


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically (see `write_atomically`).

    Args:
      path: the file.
      tensors: arrays by name, with any strides, with a dtype that safetensors supports.
      metadata: strings by name.

    Raises:
      AdapterFileError: `read` would reject the file; nothing is written.
    """
    write_atomically(path, encode(tensors, metadata, source=str(path)))


def encode(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    source: str = "safetensors",
) -> bytes:
    """Return the bytes that `write` writes."""
    refuse_unwritable(source, tensors, metadata)
    data = serialize(
        {name: np.asarray(x, order="C") for name, x in tensors.items()},
        dict(metadata) if metadata else None,
    )
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise AdapterFileError(f"{source}: cannot be written: the header would exceed 32 MiB")
    return data


def refuse_unwritable(
    source: str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None
) -> None:
    """Raise if `read` would reject a file of these tensors; only their dtypes are looked at.

    Raises:
      AdapterFileError: it would; all reasons are listed.
    """
    problems = [
        f"tensor {shown_value(name)}: {problem}"
        for name, x in tensors.items()
        for problem in (
            *_name_problems(name),
            *([] if x.dtype in _NAMES else [f"safetensors does not support the dtype {x.dtype}"]),
        )
    ]
    problems += _metadata_problems(dict(metadata or {}))
    if problems:
        raise AdapterFileError(f"{source}: cannot be written:\n" + lines(problems))


def name_of_dtype(dtype: Any) -> str:
    """Return a dtype's name in safetensors: "BF16"."""
    return _NAMES[np.dtype(dtype)]


def in_file_order(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names in the order that safetensors writes: the widest dtypes first."""
    return sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))


def _open(path: str | os.PathLike) -> io.BufferedIOBase:
    try:
        # Reading a pipe would block; reading a device would never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AdapterFileError(f"{path}: not a file")
        return Path(path).open("rb")
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: no such file") from None
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror}") from None


def _read(
    file: io.BufferedIOBase, source: str, finite: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    header, start = _header(file, source)
    tensors = {}
    for name, info in header.tensors.items():
        array = np.empty(info.shape, info.dtype)
        file.seek(start + info.start)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != info.stop - info.start:
            raise AdapterFileError(f"{source}: the file became shorter while it was read")
        if info.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
            raise AdapterFileError(
                f"{source}: tensor {shown_value(name)} has bools other than 0 and 1"
            )
        tensors[name] = array
    if finite:
        bad = [shown_value(name) for name, x in tensors.items() if not _is_finite(x)]
        if bad:
            raise AdapterFileError(f"{source}: NaN or infinite values in:\n" + lines(bad))
    return tensors, header.metadata


def _is_finite(x: np.ndarray) -> bool:
    if x.dtype.kind in "biu":
        return True
    with np.errstate(invalid="ignore"):  # of the 8- and 16-bit dtypes, some NaNs warn
        return bool(np.isfinite(x).all())


def _header(file: io.BufferedIOBase, source: str) -> tuple[Header, int]:
    """Read and check the header; return it and the position where the data starts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = file.read(64)
    length = int.from_bytes(begin[:8], "little")
    if size < 10 or length > size - 8 or length < 2 or begin[8:9] != b"{":
        raise AdapterFileError(f"{source}: {_what_else(begin, size, length)}")
    if length > MAX_HEADER:
        raise AdapterFileError(
            f"{source}: the header has {length:,} bytes, but the limit is {MAX_HEADER:,}"
        )
    file.seek(8)
    value = parse_json(file.read(length), f"{source}: not a complete safetensors file: its header")
    metadata = value.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null
    problems = _metadata_problems(metadata)
    tensors = {}
    for name, record in value.items():
        found = [*_name_problems(name), *_record_problems(record)]
        problems += [f"tensor {shown_value(name)}: {problem}" for problem in found]
        if not found:
            tensors[name] = TensorInfo(
                _DTYPES[record["dtype"]], tuple(record["shape"]), *record["data_offsets"]
            )
    problems = problems or _offset_problems(tensors, size - 8 - length)
    if problems:
        raise AdapterFileError(f"{source}: not a complete safetensors file:\n" + lines(problems))
    return Header(tensors, metadata), 8 + length


def _what_else(begin: bytes, size: int, length: int) -> str:
    if begin[8:9] == b"{":
        why = f"its header should have {length:,} bytes, but the file has {size:,}"
        return f"not a complete safetensors file: {why}"
    for pattern, what in _FOREIGN.items():
        if re.match(pattern, begin):
            return f"not a safetensors file, but {what}"
    why = "it does not start with the size of a header and a JSON object"
    return f"not a complete safetensors file: {f'it has {size} bytes' if size < 10 else why}"


def _name_problems(name: str) -> list[str]:
    if not name or len(name) > MAX_NAME:
        return [f"a name must have 1 to {MAX_NAME:,} characters, this one has {len(name):,}"]
    if not name.isprintable():
        return ["a name must not contain control characters"]
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name[0] in "/\\" or re.match(r"[A-Za-z]:[/\\]", name):
        return ["a name must not lead out of a directory"]
    return []


def _metadata_problems(metadata: Any) -> list[str]:
    if not isinstance(metadata, dict):
        return [f"metadata must be a mapping, got {shown_value(metadata)}"]
    return [
        f"metadata {shown_value(str(key))} must be a string, got {shown_value(x)}"
        for key, x in metadata.items()
        if not (isinstance(x, str) and isinstance(key, str))
    ]


def _record_problems(record: Any) -> list[str]:
    """List what is wrong with a tensor's entry by itself."""
    if not isinstance(record, dict) or sorted(record) != sorted(_FIELDS):
        return [f"must have dtype, shape and data_offsets, got {shown_value(record)}"]
    dtype, shape, offsets = (record[field] for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return [f"unknown dtype {shown_value(dtype)}"]
    if not _are_sizes(shape) or len(shape) > 32:
        return [f"shape {shown_value(shape)} is not a list of sizes"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return [f"data_offsets {shown_value(offsets)} are not a start and an end"]
    itemsize = _DTYPES[dtype].itemsize
    if math.prod(n or 1 for n in shape) * itemsize > sys.maxsize:
        return [f"shape {shape} exceeds any memory"]
    needed, got = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    return [] if needed == got else [f"{dtype} {shape} needs {needed:,} bytes, but has {got:,}"]


def _are_sizes(values: Any) -> bool:
    # type(), because a bool is an int
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _offset_problems(tensors: Mapping[str, TensorInfo], size: int) -> list[str]:
    """List where the tensors, each valid by itself, do not fill the data contiguously."""
    at, problems = 0, []
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            what = "overlaps the previous one" if info.start < at else "leaves a gap before it"
            problems.append(
                f"tensor {shown_value(name)}: {what} (starts at {info.start:,}, not {at:,})"
            )
        at = max(at, info.stop)
    if at != size:
        problems.append(f"the tensors need {at:,} bytes, but the file contains {size:,}")
    return problems
