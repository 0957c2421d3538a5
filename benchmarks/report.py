"""Parts of every table: the machine, the versions, and ratios within a round."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from benchmarks.measure import median


def versions(*packages: str) -> str:
    """Return the machine and the installed versions of `packages`, for a caption."""
    found = []
    for name in ("jax", "jaxlib", *packages):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(found)}"


def ratio(mine: Sequence[float], others: Sequence[float]) -> str:
    """Return one contender's time over another's in the same round: the median over the rounds."""
    return f"{median([m / o for m, o in zip(mine, others, strict=True)]):.3f}"
