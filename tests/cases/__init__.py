"""The one table of programs over which every property of the engine is tested."""

from tests.cases import arrays, containers, dense, found, layers  # noqa: F401 (they fill the table)
from tests.cases.table import (
    CASES,
    DENSE_CASES,
    Case,
    adapt,
    is_node,
    linen,
    merged,
    normal,
    randomize,
)

__all__ = [
    "CASES",
    "DENSE_CASES",
    "Case",
    "adapt",
    "is_node",
    "linen",
    "merged",
    "normal",
    "randomize",
]
