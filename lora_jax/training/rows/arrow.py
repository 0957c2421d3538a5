"""Arrow files, and the directories that Hugging Face's `datasets` keeps them in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_jax.core.foreign import shown
from lora_jax.files.disk.strict_json import parse_json
from lora_jax.training.errors import DataError

#: What `datasets` names the parts of a `DatasetDict`.
TRAINING = ("train",)
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_dataset(path: Path) -> bool:
    """Return whether a directory is one that `save_to_disk` of `datasets` has written."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def files_of(path: Path, splits: Sequence[str]) -> list[Path]:
    """Return the Arrow files of a directory of `datasets`, in the order of their rows.

    Args:
      path: a `Dataset`, or a `DatasetDict`.
      splits: names of a split, of which the first that a `DatasetDict` has is taken.

    Raises:
      DataError: the directory is damaged, or has none of the splits.
    """
    if (path / _STATE).is_file():
        return [path / name for name in _names(path)]
    found = _read(path / _SPLITS, "splits", list)
    split = next((name for name in splits if name in found), None)
    if split is None:
        named = ", ".join(shown(str(name)) for name in found)
        raise DataError(f"{path}: has no split {splits[0]}, but {named}; name one, as {path}/NAME")
    return files_of(path / split, splits)


def _names(path: Path) -> list[str]:
    entries = _read(path / _STATE, "_data_files", list)
    given = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    names = [name for name in given if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(given):
        raise DataError(f"{path / _STATE}: is damaged: _data_files does not name files")
    return names


def _read(path: Path, key: str, kind: type) -> Any:
    try:
        value = parse_json(path.read_bytes(), str(path), DataError)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise DataError(f"{path}: is damaged: {key} is not a {kind.__name__}")
    return value[key]


@contextmanager
def errors_of_pyarrow(path: Path, form: str) -> Iterator[Any]:
    """Import `pyarrow` for a block; what it raises there becomes a `DataError`.

    Raises:
      DataError: the package is missing, or the file cannot be read.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading {form} needs the package pyarrow; pip install 'lora-jax[parquet]', "
            "or convert the file to .jsonl"
        ) from None
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = shown(" ".join(str(error).split()))
        raise DataError(f"{path}: cannot be read as {form}: {said}") from None


def table(path: Path) -> Any:
    """Return the table of an Arrow file, whose values stay on the disk until they are asked for.

    Raises:
      DataError: the file cannot be read, or the package pyarrow is missing.
    """
    try:
        there = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return _table(path, there.st_size, there.st_mtime_ns)


@lru_cache(maxsize=4)
def _table(path: Path, *_: int) -> Any:
    with errors_of_pyarrow(path, "Arrow") as pyarrow:
        source = pyarrow.memory_map(str(path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        return opened(source).read_all()


def size_of(path: Path) -> tuple[int, int]:
    """Return the rows of an Arrow file, and the bytes of their values.

    Raises:
      DataError: the file cannot be read, or the package pyarrow is missing.
    """
    found = table(path)
    with errors_of_pyarrow(path, "Arrow"):  # the names of columns may be damaged
        return found.num_rows, found.nbytes


def read_slice(path: Path, start: int, stop: int) -> list[dict[str, Any]]:
    """Return some rows of an Arrow file.

    Raises:
      DataError: the file cannot be read, or values of these rows are damaged.
    """
    with errors_of_pyarrow(path, "Arrow"):
        part = table(path).slice(start, stop - start)
        part.validate(full=True)
        return part.to_pylist()


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file; errors as of `read_slice`."""
    rows = table(path).num_rows
    for start in range(0, rows, _TOGETHER):
        yield from read_slice(path, start, min(start + _TOGETHER, rows))


_TOGETHER = 4096  # rows
