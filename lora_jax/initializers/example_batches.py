"""Sums over example batches of what a function returns for each."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError

Batch = tuple[Any, ...]


def as_batches(caller: str, batches: Iterable[Any]) -> list[Batch]:
    """Return the batches as a list of tuples of arguments.

    Raises:
      ConfigError: there are none, or one of them is not a tuple or list.
    """
    if not isinstance(batches, Iterable):
        raise ConfigError(f"{caller}: batches must be an iterable, got {type(batches).__name__}")
    found = list(batches)
    if not found:
        raise ConfigError(f"{caller}: batches is empty; give at least one tuple of arguments")
    for batch in found:
        if not isinstance(batch, tuple | list):
            raise ConfigError(
                f"{caller}: each batch must be a tuple of the arguments after the parameters, got "
                f"{type(batch).__name__}. For a function of one argument write [(x,), ...]"
            )
    return [tuple(batch) for batch in found]


def sum_over_batches(fn: Callable, fixed: Sequence[Any], batches: Sequence[Batch]) -> Any:
    """Return the sum over batches of `fn(*fixed, *batch)`, a tree of arrays.

    `fn` is compiled once for batches of the same shapes. What is not an array in a batch (a flag, a
    name) or in `fixed` (an activation function of an Equinox model) is a constant of the compiled
    function, and must be hashable.
    """

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def one(constants: Constants, arrays: Any, own: Constants, fixed: Sequence[Any]) -> Any:
        return fn(*own.with_arrays(fixed), *constants.with_arrays(arrays))

    total = None
    own, arrays_of_fixed = separate(tuple(fixed))
    for batch in batches:
        value = one(*separate(batch), own, arrays_of_fixed)
        total = value if total is None else _add(total, value)
    return total


@jax.jit
def _add(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


@dataclasses.dataclass(frozen=True)
class Constants:
    """The leaves of a tree other than arrays, and where the arrays belong."""

    treedef: Any
    leaves: tuple[Any, ...]  # None in the place of an array
    positions: tuple[int, ...]  # of the arrays

    def with_arrays(self, arrays: Sequence[Any]) -> Any:
        """Return the tree with these arrays in their places."""
        leaves = list(self.leaves)
        for i, array in zip(self.positions, arrays, strict=True):
            leaves[i] = array
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def separate(tree: Any) -> tuple[Constants, list[Any]]:
    """Split a tree into its constants and its arrays, or what stands for an array."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    arrays = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    at = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, arrays))
    constants = tuple(None if i in at else leaf for i, leaf in enumerate(leaves))
    return Constants(treedef, constants, at), [leaves[i] for i in at]
