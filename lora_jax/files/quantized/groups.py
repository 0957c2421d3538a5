"""Groups of a weight's inputs that share a scale, as blocks of equal length."""

import math
from dataclasses import dataclass

import numpy as np

#: The shortest block that is kept: with a scale for fewer codes, the scales are most of the bytes.
SHORTEST = 8


@dataclass(frozen=True)
class Groups:
    """How the inputs of a weight lie in groups.

    Attributes:
      block: a number of neighbouring inputs that are in one group.
      index: the group of each block.
      order: the inputs, sorted by group; None where they are already.
    """

    block: int
    index: np.ndarray
    order: np.ndarray | None = None

    @property
    def kept(self) -> bool:
        """Whether blocks of neighbours are long enough for codes that are kept."""
        return self.order is None and self.block >= SHORTEST


def regular(size: int, group: int) -> Groups:
    """Return groups of `group` neighbours, of which the last may be shorter.

    >>> regular(96, 64)
    Groups(block=32, index=array([0, 0, 1]), order=None)
    """
    block = math.gcd(size, group) if group < size else size
    return Groups(block, np.arange(size // block) * block // group)


def irregular(group_of: np.ndarray) -> Groups:
    """Return the groups that each input names.

    >>> irregular(np.array([1, 0, 1, 0]))
    Groups(block=2, index=array([0, 1]), order=array([1, 3, 0, 2]))
    """
    order = None
    if (np.diff(group_of) < 0).any():
        order = np.argsort(group_of, kind="stable")
        group_of = group_of[order]
    starts = np.flatnonzero(np.diff(group_of)) + 1
    block = math.gcd(group_of.size, *starts.tolist())
    return Groups(block, group_of[::block], order)
