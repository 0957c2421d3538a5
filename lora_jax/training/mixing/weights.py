"""The weight at the end of a file's name: `a.jsonl=0.5`."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError

LARGEST = 1000.0


def parse(names: Iterable[str | Path]) -> list[tuple[Path, float]]:
    """Return the files, directories or patterns that names stand for, and their weights.

    A weight is how often each row is visited per epoch; without one it is 1. What exists under the
    whole name has no weight.

    Raises:
      DataError: a weight is not a positive number up to 1,000.

    >>> parse(["a.jsonl=2", "b.jsonl=0.5", "c=d.txt"])
    [(PosixPath('a.jsonl'), 2.0), (PosixPath('b.jsonl'), 0.5), (PosixPath('c=d.txt'), 1.0)]
    """
    return [_parse(Path(name)) for name in names]


def _parse(path: Path) -> tuple[Path, float]:
    name, mark, text = str(path).rpartition("=")
    if not mark or not name or os.path.exists(path):
        return path, 1.0
    try:
        weight = float(text)
    except ValueError:
        return path, 1.0
    if not math.isfinite(weight) or not 0 < weight <= LARGEST:
        raise DataError(
            f"{shown(str(path))}: a weight must be above 0 and at most {LARGEST:g}, got {text}"
        )
    return Path(name), weight
