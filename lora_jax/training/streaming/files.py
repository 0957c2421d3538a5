"""The files that `--data` names: files, directories and patterns."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_jax.training.errors import DataError
from lora_jax.training.rows.arrow import HELD_OUT, TRAINING, files_of, is_dataset
from lora_jax.training.rows.compressed import suffixes

#: The suffixes of files that can be trained on.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def find_files(names: Iterable[str | Path], splits: Sequence[str] = TRAINING) -> list[Path]:
    """Return the files that names stand for: the same ones in the same order on every machine.

    Args:
      names: of files, as they are; of directories, whose files with one of the `SUFFIXES` are taken
        in the order of their paths; or patterns with `*`, `?`, `[...]` and `**`, likewise.
      splits: names of a split, of which the first that is there is taken: in a `DatasetDict` that
        `datasets` has written, and in a directory where names begin with "train".

    Raises:
      DataError: a directory has no such file or split, or nothing fits a pattern.
    """
    return [file for name in names for file in _find(Path(name), splits)]


def _find(path: Path, splits: Sequence[str]) -> Sequence[Path]:
    if is_dataset(path):
        return files_of(path, splits)
    if path.is_dir():
        return divide_directory(path, splits)[0]
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(Path(x) for x in glob.glob(str(path), recursive=True) if Path(x).is_file())
    if not found:
        raise DataError(f"{path}: no file fits this pattern")
    return found


def divide_directory(path: Path, splits: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of a split in a directory, and those that are of other splits.

    Where no name begins with "train", all files are taken. Files without the name of a split are
    for training.

    Raises:
      DataError: the directory has no file of data, or none of the splits.
    """
    found = sorted(x for x in path.rglob("*") if suffixes(x)[0] in SUFFIXES and x.is_file())
    if not found:
        raise DataError(f"{path}: the directory has no file of data ({', '.join(SUFFIXES)})")
    names = {file: split_of(file.relative_to(path)) for file in found}
    there = {name for name in names.values() if name is not None}
    if not there & {*TRAINING}:
        return found, []
    names = {file: name or TRAINING[0] for file, name in names.items()}
    chosen = next((name for name in splits if name in there), None)
    if chosen is None:
        raise DataError(
            f"{path}: has files of {', '.join(sorted(there))}, but none of {splits[0]}; name a "
            "file or a pattern"
        )
    others = [file for file in found if names[file] != chosen]
    return [file for file in found if names[file] == chosen], others


_SPLIT = re.compile(rf"({'|'.join((*TRAINING, *HELD_OUT))})(?![a-z])", re.IGNORECASE)


def split_of(path: Path) -> str | None:
    """Return the split that a file's name begins with, or else the name of a directory of it.

    >>> [split_of(Path(x)) for x in ("train.jsonl", "data/test-00000-of-00001.parquet", "a.csv")]
    ['train', 'test', None]
    """
    found = (_SPLIT.match(part) for part in reversed(path.parts))
    return next((match[1].lower() for match in found if match), None)


def total_bytes(files: Iterable[Path]) -> int:
    """Return the size of all files together; a missing one counts nothing."""
    return sum(file.stat().st_size for file in files if file.is_file())
