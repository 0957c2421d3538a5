"""Which items of a source an epoch visits: each equally often, whatever the weight is.

A source is read as an endless sequence: all of its items in one order, then all of them in another
order, and so on. An epoch takes the next items of it. So a weight of 2 takes everything twice, and
with a weight of 0.5 two epochs take everything once.
"""

import math

import numpy as np


def in_turn(count: int, weight: float, epoch: int) -> range:
    """Return the places in the endless sequence that an epoch takes: `weight` times `count` of it.

    The numbers differ by at most one between epochs.

    >>> [in_turn(3, 0.5, epoch) for epoch in range(3)]
    [range(0, 1), range(1, 3), range(3, 4)]
    """
    return range(math.floor(epoch * weight * count), math.floor((epoch + 1) * weight * count))


def equal(count: int, weight: float, epoch: int) -> range:
    """Return the places that an epoch takes, as many in each epoch and at least one.

    >>> [equal(3, 0.5, epoch) for epoch in range(3)]
    [range(0, 2), range(2, 4), range(4, 6)]
    """
    size = max(1, round(weight * count))
    return range(epoch * size, (epoch + 1) * size)


def items(places: range, count: int, seed: int | None, source: int) -> np.ndarray:
    """Return the items at some places of the endless sequence of a source, int64 `[places]`.

    Args:
      places: from `in_turn` or `equal`.
      count: of the items of the source.
      seed: for their orders; None for the order that they have.
      source: the number of the source.

    >>> items(range(2, 7), 3, None, 0)
    array([2, 0, 1, 2, 0])
    """
    found = []
    for turn in range(places.start // count, -(-places.stop // count)):
        order = np.arange(count)
        if seed is not None:
            order = np.random.default_rng([seed, source, turn]).permutation(count)
        start = max(places.start - turn * count, 0)
        found.append(order[start : min(places.stop - turn * count, count)])
    return np.concatenate([np.arange(0), *found])
