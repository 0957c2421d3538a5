"""What is damaged: files, the function that reads them, and what may come of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = dict[str, bytes]  # by path within a directory
#: The outcome in a few words, and what is wrong with it, if anything.
Verdict = tuple[str, str]


@dataclass(frozen=True)
class Subject:
    """Files, and the function that reads them from the directory that they are in."""

    files: Files
    load: Callable[[Path], Any]
    judge: Callable[[Any, Path], Verdict]  # of what `load` returned, and the directory
    writes: bool = False  # whether reading may write beside the files


def read_files(folder: Path) -> Files:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def write_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
