"""PyTorch's tensors of a tree, made one at a time from its leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.core.host_memory import fetch
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.reading import StoredLeaf, stored_blocks


@dataclass(frozen=True)
class Part:
    """What one leaf contributes to a tensor.

    Attributes:
      place: of the leaf.
      where: the layer, as in `Place.layers`.
      number: which of the tensors that are joined in the leaf.
      leaf: an array, or an object like a `StoredLeaf`, which makes one layer at a time.
    """

    place: Place
    where: tuple[int, ...]
    number: int
    leaf: Any

    def values(self) -> np.ndarray:
        """Return this part in PyTorch's axes."""
        place = self.place
        weight = place.weight_to_torch(self._layer())
        if len(place.entry.torch_names) == 1:
            return weight
        ends = np.cumsum(place.widths)[:-1]
        return np.split(weight, ends, place.entry.out_axis)[self.number]

    def _layer(self) -> np.ndarray:
        """Return the layer without its stacked axes."""
        at = self.place.at(self.where)
        if hasattr(self.leaf, "layer"):
            one = self.leaf.layer(self.where)
            return one[tuple(0 if isinstance(index, int) else index for index in at)]
        if not self.where or not isinstance(self.leaf, jax.Array):
            return fetch(self.leaf)[at]
        return fetch(self.leaf, at)


@dataclass(frozen=True)
class TorchTensor:
    """A tensor whose values are made from the leaves of a tree when they are asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Part, ...]  # several if leaves share the tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.parts[0].values()
        if len(self.parts[0].place.entry.paths) > 1:
            values = np.empty(self.shape, self.dtype)
            for part in self.parts:
                part.place.part_of(values)[...] = part.values()
        return values if dtype is None else values.astype(dtype, copy=False)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the values in row-major order, in parts if a leaf stays in a file as they are."""
        first = self.parts[0]
        if len(self.parts) == 1 and isinstance(first.leaf, StoredLeaf):
            found = stored_blocks(first.leaf, first.place, first.where)
            if found is not None:
                yield from found
                return
        yield np.asarray(self)
