"""Rows in memory from several sources, each with a weight."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from lora_jax.training.batching import Data
from lora_jax.training.mixing.visits import equal, items


@dataclasses.dataclass(frozen=True)
class Mixture(Data):
    """Rows of several sources, one after the other; the number of rows per epoch is fixed."""

    sources: tuple[tuple[int, float], ...] = ()  # rows and weight of each

    @property
    def visited(self) -> int:
        """How many rows an epoch visits."""
        return sum(len(equal(rows, weight, 0)) for rows, weight in self.sources)

    def order(self, seed: int | None, epoch: int) -> np.ndarray:
        """Return the rows of an epoch; some come several times."""
        found, first = [], 0
        for number, (rows, weight) in enumerate(self.sources):
            places = equal(rows, weight, epoch)
            found.append(first + items(places, rows, seed, number))
            first += rows
        visited = np.concatenate(found)
        if seed is None:
            return visited
        return visited[np.random.default_rng([seed, epoch]).permutation(len(visited))]

    def checksum(self) -> str:
        """Return a checksum of all values and of the weights."""
        return hashlib.sha256(f"{super().checksum()} {self.sources}".encode()).hexdigest()


def mix(parts: Sequence[Data], weights: Sequence[float]) -> Data:
    """Return the rows of all parts; a single one with the weight 1 is returned as it is."""
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]
    joined = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    return Mixture(joined, tuple(zip(map(len, parts), weights, strict=True)))
