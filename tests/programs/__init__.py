"""The one table of programs over which every property of the engine is tested."""

from tests.programs import (  # noqa: F401 (they fill the table)
    arrays,
    concatenation,
    containers,
    convolutions,
    dense,
    derivatives,
    experts,
    found_by_fuzzer,
    indexing,
    layers,
    sharded,
)
from tests.programs.table import (
    CASES,
    DENSE_CASES,
    Case,
    a_few,
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
    "a_few",
    "adapt",
    "is_node",
    "linen",
    "merged",
    "normal",
    "randomize",
]
