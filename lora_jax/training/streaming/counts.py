"""How many rows each part of a stream had, so that a resumed run need not tokenize it again."""

import json
import threading
from pathlib import Path

from lora_jax.core.checks import is_integer

#: Lane, epoch and number of a window.
Key = tuple[int, int, int]


class Counts:
    """The rows of windows that were packed, kept in the files `rows-*.jsonl` of a directory.

    They save time and decide nothing: without them the rows are counted again.

    Args:
      directory: None keeps the counts in memory alone.
      process: the number of this process, which has its own file.
    """

    def __init__(self, directory: Path | None, process: int = 0) -> None:
        self._known: dict[Key, int] = {}
        self._lock = threading.Lock()
        self._file = None if directory is None else directory / f"rows-{process}.jsonl"
        for file in sorted(directory.glob("rows-*.jsonl")) if directory else ():
            for line in file.read_text("utf-8", errors="replace").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            return  # torn when a process was killed
        if isinstance(found, list) and len(found) == 4 and all(map(is_integer, found)):
            lane, epoch, number, rows = found
            self._known[lane, epoch, number] = rows

    def get(self, key: Key) -> int | None:
        """Return how many rows a window has, if that is known."""
        return self._known.get(key)

    def set(self, key: Key, rows: int) -> None:
        """Remember how many rows a window has."""
        with self._lock:
            if self._known.get(key) == rows:
                return
            self._known[key] = rows
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*key, rows]) + "\n")
