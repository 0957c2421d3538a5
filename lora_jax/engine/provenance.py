"""`Provenance`: the parameters that a view comes from, and what happened to them on the way."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Source(NamedTuple):
    """A parameter in a view, or several of which the program chooses one (`cond`)."""

    paths: tuple[str, ...]
    ndim: int

    def __str__(self) -> str:
        return " or ".join(self.paths)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a view came about: layout inference reads it, and messages name parameters by it.

    Parameter axes are numbered through all sources: of two matrices that are concatenated the
    first has the axes 0 and 1, the second 2 and 3.
    """

    sources: tuple[Source, ...]
    indexed: tuple[int, ...] = ()  # parameter axes that were indexed away, by a loop or a number
    # the factor whose rows were picked by an array of ids; "a" while uses are inferred
    looked_up: str = ""
    altered: bool = False  # whether something that no rule covers (a mask, a norm) was done to it

    @classmethod
    def of(cls, path: str, ndim: int) -> "Provenance":
        """Return the provenance of a whole parameter."""
        return cls((Source((path,), ndim),))

    @property
    def ndim(self) -> int:
        """The number of parameter axes, of all sources together."""
        return sum(source.ndim for source in self.sources)

    def __str__(self) -> str:
        return " + ".join(map(str, self.sources))

    def index_away(self, axes: Iterable[int]) -> "Provenance":
        """Return the provenance with these parameter axes indexed away too."""
        return dataclasses.replace(self, indexed=tuple(sorted({*self.indexed, *axes})))


def join(origins: Sequence[Provenance]) -> tuple[Provenance, list[list[int]]]:
    """Return the provenance of a view made of several, and per view its axes' new numbers."""
    sources = tuple(dict.fromkeys(source for origin in origins for source in origin.sources))
    starts = itertools.accumulate((source.ndim for source in sources), initial=0)
    start = dict(zip(sources, starts, strict=False))  # the last one is the end
    numbers = [
        [start[source] + i for source in origin.sources for i in range(source.ndim)]
        for origin in origins
    ]
    indexed = {n[i] for origin, n in zip(origins, numbers, strict=True) for i in origin.indexed}
    altered = any(origin.altered for origin in origins)
    return Provenance(sources, tuple(sorted(indexed)), altered=altered), numbers


def choose(origins: Sequence[Provenance]) -> Provenance | None:
    """Return the provenance of one of several views; None where they are of different kinds."""
    kinds = {
        (dataclasses.replace(origin, sources=()), *(source.ndim for source in origin.sources))
        for origin in origins
    }
    if len(kinds) > 1:
        return None
    sources = [
        Source(tuple(dict.fromkeys(path for source in column for path in source.paths)), ndim)
        for column in zip(*(origin.sources for origin in origins), strict=True)
        for ndim in [column[0].ndim]
    ]
    return dataclasses.replace(origins[0], sources=tuple(sources))
