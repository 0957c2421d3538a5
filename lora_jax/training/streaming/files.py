"""The files that `--data` names: files, directories and patterns."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_jax.training.errors import DataError
from lora_jax.training.rows.arrow import TRAINING, files_of, is_dataset
from lora_jax.training.rows.compressed import suffixes

#: The suffixes of files that can be trained on.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def find_files(names: Iterable[str | Path], splits: Sequence[str] = TRAINING) -> list[Path]:
    """Return the files that names stand for: the same ones in the same order on every machine.

    Args:
      names: of files, as they are; of directories, whose files with one of the `SUFFIXES` are taken
        in the order of their paths; or patterns with `*`, `?`, `[...]` and `**`, likewise. In a
        directory that `datasets` has written are its Arrow files.
      splits: names of a split, of which the first that a `DatasetDict` has is taken.

    Raises:
      DataError: a directory has no such file, or nothing fits a pattern.
    """
    return [file for name in names for file in _find(Path(name), splits)]


def _find(path: Path, splits: Sequence[str]) -> Sequence[Path]:
    if is_dataset(path):
        return files_of(path, splits)
    if path.is_dir():
        found = sorted(x for x in path.rglob("*") if suffixes(x)[0] in SUFFIXES and x.is_file())
        if not found:
            raise DataError(f"{path}: the directory has no file of data ({', '.join(SUFFIXES)})")
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(Path(x) for x in glob.glob(str(path), recursive=True) if Path(x).is_file())
    if not found:
        raise DataError(f"{path}: no file fits this pattern")
    return found


def total_bytes(files: Iterable[Path]) -> int:
    """Return the size of all files together; a missing one counts nothing."""
    return sum(file.stat().st_size for file in files if file.is_file())
