"""A weight with the adapters of all slots, and which one of them a row uses."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine.lazy_weight import SLOT, Axis, LazyWeight


def pick(lazy: LazyWeight) -> LazyWeight:
    """Return the weight with the adapter of its row alone; without rows, the weight itself.

    Under the `vmap` over rows this gathers A and B per row: `[slots, in, rank]` becomes
    `[rows, in, rank]`.
    """
    if lazy.row is None:
        return lazy
    slot, number = lazy.row

    def one(array: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        if SLOT not in axes:
            return array, axes
        at = axes.index(SLOT)
        taken = lax.dynamic_index_in_dim(array, jnp.maximum(slot, 0), at, keepdims=False)
        return taken, axes[:at] + axes[at + 1 :]

    picked = lazy.map_members(one)
    on = slot >= 0
    b = jnp.where(on, picked.b, jnp.zeros_like(picked.b))
    gain = None if picked.gain is None else jnp.where(on, picked.gain, 1)
    key = None if picked.key is None else _folded(picked.key, number)
    return dataclasses.replace(picked, b=b, gain=gain, key=key, row=None)


def _folded(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Return other keys for each row: two rows of one adapter do not drop the same inputs."""
    fold = lambda key: jax.random.fold_in(key, number)
    return jax.vmap(fold)(keys.reshape(-1)).reshape(keys.shape)
