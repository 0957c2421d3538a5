"""Model directories in Hugging Face's layout: config.json, and safetensors in one or more files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.disk import safetensors_file, strict_json
from lora_jax.files.disk.atomic import write_directory

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, read from its file when `np.asarray` asks for its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its bytes in the file

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._read(self.shape, self.offset)
        return values if dtype is None else values.astype(dtype, copy=False)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read a part of the first axis, without the rest of the tensor."""
        others = self.shape[1:]
        bytes_of_row = math.prod(others) * self.dtype.itemsize
        return self._read((stop - start, *others), self.offset + start * bytes_of_row)

    def _read(self, shape: tuple[int, ...], offset: int) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        stored = np.fromfile(self.file, np.uint8, size, offset=offset)
        if stored.size != size:
            raise ModelFileError(f"{self.file}: was truncated while it was being read")
        return stored.view(self.dtype).reshape(shape)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read a directory's config.json.

    Raises:
      FileNotFoundError: the file is missing.
      ModelFileError: it is not a JSON object.
    """
    path = Path(directory) / CONFIG
    try:
        settings = strict_json.parse_json(path.read_bytes(), str(path), ModelFileError)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(settings, dict):
        raise ModelFileError(f"{path}: is not a JSON object")
    return settings


def tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Return the tensors of a directory by name, of any dtype.

    Only headers are read; a tensor's values are read when `np.asarray` asks for them, so only one
    tensor at a time needs to be in memory.

    Args:
      directory: with `model.safetensors`, or with `model.safetensors.index.json` and the files
        that it names.

    Raises:
      FileNotFoundError: it has neither.
      ModelFileError: a file is damaged, or index and files disagree: everything missing or in
        the wrong file is listed.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return _read_header(directory / WEIGHTS)
    index = _read_index(directory / INDEX)
    found: dict[str, StoredTensor] = {}
    problems = []
    for shard in sorted(set(index.values())):
        if not (directory / shard).is_file():
            count = sum(file == shard for file in index.values())
            problems.append(f"{shard}: missing, with {count} tensors")
            continue
        stored = _read_header(directory / shard)
        wanted = {name for name, file in index.items() if file == shard}
        problems += [f"{shown(name)}: not in {shard}" for name in wanted - stored.keys()]
        problems += [
            f"{shown(name)}: in {shard}, but the index does not say so"
            for name in stored.keys() - wanted
        ]
        found |= stored
    if problems:
        raise ModelFileError(
            f"{directory / INDEX} does not match its files:\n  " + "\n  ".join(sorted(problems))
        )
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file."""
    if not path.exists():
        pickles = sorted(path.parent.glob("pytorch_model*.bin"))
        hint = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        header = safetensors_file.headers(path).tensors
    except AdapterFileError as error:
        raise ModelFileError(str(error)) from None
    # the values end where the file ends
    start = path.stat().st_size - max((info.stop for info in header.values()), default=0)
    return {
        name: StoredTensor(path, info.shape, info.dtype, start + info.start)
        for name, info in header.items()
    }


def _read_index(path: Path) -> dict[str, str]:
    """Read an index: {tensor: file}."""
    try:
        index = strict_json.parse_json(path.read_bytes(), str(path), ModelFileError)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ModelFileError(f"{path}: has no weight_map from tensors to files")
    if wrong := [x for x in files.values() if not _is_file_name(x)]:
        name = shown_value(wrong[0])
        raise ModelFileError(f"{path}: {name} is not the name of a file in its directory")
    return files


def _is_file_name(x: Any) -> bool:
    """Return whether `x` is a name that every file system takes, without a directory."""
    if not isinstance(x, str) or x in ("", ".", ".."):
        return False
    return x.isprintable() and len(x.encode()) < 256 and Path(x).name == x


def write(
    directory: str | Path, settings: Mapping[str, Any], values: Mapping[str, np.ndarray]
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Raises:
      ModelFileError: the directory contains a model in several files, which would remain.
    """
    directory = Path(directory)
    if (directory / INDEX).exists():
        raise ModelFileError(
            f"{directory} contains a model in several files; write to another directory"
        )
    write_directory(directory, files(settings, values))


def files(settings: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Return the files that `write` writes, by name."""
    config = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    data = safetensors_file.encode(values, {"format": "pt"}, source=WEIGHTS)
    return {CONFIG: config.encode(), WEIGHTS: data}
