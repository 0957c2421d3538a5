"""What became of one random configuration, and how results and files are compared."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.disk import safetensors_file

#: The largest difference that rounding makes, of values up to 1 and relative to larger ones.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration.

    Attributes:
      sort: "equal", "refused" with a field, "refused there" by transformers, or a problem.
      text: what happened.
      apart: the largest difference of results.
      about: the configuration, as far as it says more than the seed.
    """

    sort: str
    text: str = ""
    apart: float = 0.0
    about: Any = None

    @property
    def is_problem(self) -> bool:
        return self.sort not in ("equal", "refused", "refused there")


def refusal(error: Exception, names: Iterable[str]) -> Outcome:
    """Return a refusal, which must be one line with one of these names of fields."""
    line = re.sub(r"^\S*/there(/\S*)?: ", "", str(error))
    is_named = any(re.search(rf"\b{name}\b", line) for name in names)
    return Outcome("refused" if is_named and "\n" not in line else "unclear", line)


def difference(found: Any, wanted: np.ndarray) -> float:
    """Return the largest difference, of values up to 1 absolute and of larger ones relative."""
    found = np.asarray(found, np.float32)
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.max(np.abs(found - wanted) / np.maximum(1, np.abs(wanted)), initial=0))


def file_difference(one: Path, other: Path) -> str | None:
    """Return in what the tensors of two directories differ, None if they are equal to the bit."""
    first, second = _tensors(one), _tensors(other)
    if first.keys() != second.keys():
        return f"names differ: {sorted(first.keys() ^ second.keys())[:3]}"
    for name, x in first.items():
        if x.dtype != second[name].dtype or x.tobytes() != second[name].tobytes():
            return f"{name} differs"
    return None


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors_file.read(path)[0]
    return found
