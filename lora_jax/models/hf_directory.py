"""Model directories in Hugging Face's layout: config.json, and safetensors in one or more files."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.disk import safetensors_file, strict_json
from lora_jax.files.disk.atomic import Content, write_directory
from lora_jax.files.disk.safetensors_stream import SafetensorsStream, Tensor, size_of
from lora_jax.files.naming import row_ranges
from lora_jax.models.weights.sizes import MAX_SHARD_SIZE, parse_size, split_into_files

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


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

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the values in parts, in the order of the file."""
        if not self.shape:
            yield np.asarray(self)
            return
        for start, stop in row_ranges(self):
            yield self.rows(start, stop)

    def _read(self, shape: tuple[int, ...], offset: int) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        stored = np.fromfile(self.file, np.uint8, size, offset=offset)
        if stored.size != size:
            raise ModelFileError(f"{self.file}: was truncated while it was being read")
        return stored.view(self.dtype).reshape(shape)


def read_config(directory: str | Path, name: str = CONFIG) -> dict[str, Any]:
    """Read a directory's config.json, or another file with a JSON object.

    Raises:
      FileNotFoundError: the file is missing.
      ModelFileError: it is not a JSON object.
    """
    path = Path(directory) / name
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
    directory: str | Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json and the weights: all of the old files or all of the new ones.

    Raises:
      ConfigError: `max_shard_size` is not a size.
      ModelFileError: the directory contains weights in other files, which would remain.
    """
    found = files(settings, tensors, max_shard_size)
    if others := other_weights(directory, found):
        raise ModelFileError(
            f"{directory}: contains a model in other files ({shown(others[0])}), which would "
            "remain; write to another directory"
        )
    write_directory(directory, found)


def other_weights(directory: str | Path, names: Collection[str]) -> list[str]:
    """Return the files of weights in a directory that are not among these names."""
    directory = Path(directory)
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(x.name for x in found if _WEIGHTS.fullmatch(x.name) and x.name not in names)


def files(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str | None = None,
) -> dict[str, Content]:
    """Return the files that `write` writes, by name, in one file of weights if no size is given."""
    config = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    split = [list(tensors)]
    if max_shard_size is not None:
        split = split_into_files(tensors, parse_size(max_shard_size)) or split
    count = len(split)
    shard_names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    shard_names = shard_names if count > 1 else [WEIGHTS]
    found: dict[str, Content] = {CONFIG: config.encode()}
    if count > 1:
        size = sum(map(size_of, tensors.values()))
        where = {
            name: file for file, names in zip(shard_names, split, strict=True) for name in names
        }
        index = {"metadata": {"total_size": size}, "weight_map": where}
        found[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    for file, names in zip(shard_names, split, strict=True):
        own = {name: tensors[name] for name in names}
        found[file] = SafetensorsStream(own, {"format": "pt"}, file)
    return found
