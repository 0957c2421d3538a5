"""The files that `--data` names: files, directories and patterns."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_jax.training.errors import DataError

#: The suffixes of files that can be trained on.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


def find_files(names: Iterable[str | Path]) -> list[Path]:
    """Return the files that names stand for: the same ones in the same order on every machine.

    Args:
      names: of files, as they are; of directories, whose files with one of the `SUFFIXES` are taken
        in the order of their paths; or patterns with `*`, `?`, `[...]` and `**`, likewise.

    Raises:
      DataError: a directory has no such file, or nothing fits a pattern.
    """
    return [file for name in names for file in _find(Path(name))]


def _find(path: Path) -> Sequence[Path]:
    if path.is_dir():
        found = sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
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
