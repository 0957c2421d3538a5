"""Sums over example batches, of what a function makes of each."""

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
    """The batches as a list of tuples of arguments.

    Raises:
      ConfigError: there is none, or one is no tuple or list.
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
                f"{type(batch).__name__}; write [(x,), ...] for a function of one"
            )
    return [tuple(batch) for batch in found]


def summed(fn: Callable, fixed: Sequence[Any], batches: Sequence[Batch]) -> Any:
    """The sum over batches of `fn(*fixed, *batch)`, a tree of arrays.

    Compiled once for batches of the same shapes; what is no array in a batch (a flag, a name) is
    fixed in what is compiled, and must be hashable.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def one(still: "_Still", arrays: Sequence[Any], fixed: Sequence[Any]) -> Any:
        return fn(*fixed, *still.merged(arrays))

    total = None
    for batch in batches:
        value = one(*_parted(batch), fixed)
        total = value if total is None else _plus(total, value)
    return total


@jax.jit
def _plus(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


@dataclasses.dataclass(frozen=True)
class _Still:
    """What does not change between batches of one kind."""

    treedef: Any
    leaves: tuple[Any, ...]  # None in the place of an array
    arrays: tuple[int, ...]

    def merged(self, arrays: Sequence[Any]) -> Batch:
        leaves = list(self.leaves)
        for i, array in zip(self.arrays, arrays, strict=True):
            leaves[i] = array
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def _parted(batch: Batch) -> tuple[_Still, list[Any]]:
    leaves, treedef = jax.tree_util.tree_flatten(batch)
    at = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray))
    still = tuple(None if i in at else leaf for i, leaf in enumerate(leaves))
    return _Still(treedef, still, at), [leaves[i] for i in at]
