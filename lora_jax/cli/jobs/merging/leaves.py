"""Leaves that are merged, or rounded, one layer at a time while their tensors are written."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.merge_leaf import merge_layer, take_layer
from lora_jax.core.errors import MergeError
from lora_jax.core.foreign import shown
from lora_jax.core.host_memory import fetch
from lora_jax.core.weights import Adapted, is_adapted
from lora_jax.files.naming import Place, StoredLeaf


class Merges:
    """What became of each leaf; filled while the files are written.

    Args:
      dtype: of all parameters; None for that of each leaf.
    """

    def __init__(self, dtype: str | None):
        self.dtype = dtype
        self._norms: dict[str, dict[Any, tuple[float, float]]] = {}
        self._overflowed: dict[str, None] = {}

    def of(self, path: str, leaf: Any, place: Place) -> Any:
        """Return the leaf as it is written."""
        if is_adapted(leaf):
            self._norms[path] = {}
            return MergedLeaf(path, leaf, place, jnp.dtype(self.dtype or leaf.w.dtype), self)
        if self.dtype is None:
            return leaf
        return RoundedLeaf(path, leaf, place, jnp.dtype(self.dtype), self)

    def tell(self, path: str, where: Any, lost: float, update: float) -> None:
        """Note the squared norms of what rounding lost of an update, and of the update."""
        self._norms[path][where] = lost, update

    def tell_overflow(self, path: str) -> None:
        """Note that finite values of a leaf are not finite in the dtype."""
        self._overflowed[path] = None

    def errors(self) -> dict[str, float]:
        """Return ‖lost‖/‖update‖ of each merged leaf."""
        sums = {
            path: [math.fsum(x) for x in zip(*norms.values(), strict=True)]
            for path, norms in self._norms.items()
        }
        return {
            path: math.sqrt(lost / update) if update > 0 else 0.0
            for path, (lost, update) in sums.items()
        }

    def refuse_overflow(self) -> None:
        """Raise if a leaf without an adapter overflowed.

        Raises:
          MergeError: it did; all are named.
        """
        if self._overflowed:
            raise MergeError(
                f"values of {shown(', '.join(self._overflowed))} overflow {self.dtype}; --dtype "
                "bfloat16 or float32 holds them"
            )


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """A leaf with an adapter, which is merged when it is asked for."""

    path: str
    node: Adapted
    place: Place
    dtype: np.dtype
    merges: Merges

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.node.w.shape

    def layer(self, where: tuple[int, ...]) -> np.ndarray:
        """Return one merged layer, with stacked axes of size 1."""
        w = _layer_of(self.node.w, self.place, where)
        node = take_layer(self.node, jnp.asarray(w), self.place.at(where))
        merged, lost, update = merge_layer(node, self.dtype)
        self.merges.tell(self.path, where, float(lost), float(update))
        return np.asarray(merged)


@dataclasses.dataclass(frozen=True)
class RoundedLeaf:
    """A leaf without an adapter, which is written in another dtype."""

    path: str
    leaf: Any
    place: Place
    dtype: np.dtype
    merges: Merges

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.leaf.shape

    def layer(self, where: tuple[int, ...]) -> np.ndarray:
        """Return one layer in the dtype, with stacked axes of size 1."""
        wide = _layer_of(self.leaf, self.place, where)
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            narrow = wide.astype(self.dtype)
        if np.isfinite(wide).sum() > np.isfinite(narrow).sum():
            self.merges.tell_overflow(self.path)
        return narrow


def _layer_of(leaf: Any, place: Place, where: tuple[int, ...]) -> np.ndarray:
    if isinstance(leaf, StoredLeaf):
        return leaf.layer(where)
    at = place.at(where)
    return fetch(leaf, tuple(slice(i, i + 1) if isinstance(i, int) else i for i in at))
