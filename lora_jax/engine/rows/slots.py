"""A weight with the adapters of all slots, and which of them the rows use."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import accumulator
from lora_jax.engine import named_axes
from lora_jax.engine.lazy_weight import ROW, SLOT, Axis, LazyWeight


class NoPlaceForRows(Exception):
    """A weight meets what has no axis of rows, so the rows have to be computed by `jax.vmap`."""


def pick(lazy: LazyWeight) -> LazyWeight:
    """Return the weight with the adapter of its row alone; without rows, the weight itself.

    A and B of all slots, `[slots, in, rank]`, become `[in, rank]` for one row, and for the rows of
    a whole batch `[rows, in, rank]`: they are gathered per row, never per token. The scale of many
    rows is left for `x·A`, which is smaller than the B of every row.
    """
    if lazy.row is None:
        return lazy
    slot, number, in_order = lazy.row.slot, lazy.row.number, lazy.row.in_order

    def one(array: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        if SLOT not in axes:
            return array, axes
        at = axes.index(SLOT)
        if in_order:
            return array, (*axes[:at], ROW, *axes[at + 1 :])
        ids = jnp.maximum(slot, 0)
        if slot.ndim:
            taken = jnp.take(array, ids, at, mode="clip")
            return taken, (*axes[:at], ROW, *axes[at + 1 :])
        taken = lax.dynamic_index_in_dim(array, ids, at, keepdims=False)
        return taken, axes[:at] + axes[at + 1 :]

    picked = lazy.map_members(one)
    picked = picked if slot.ndim else with_scale_in_b(picked)
    b, gain = picked.b, picked.gain
    if not in_order:
        b = jnp.where(along_rows(slot >= 0, picked.b_axes), b, jnp.zeros_like(b))
        if gain is not None:
            gain = jnp.where(along_rows(slot >= 0, picked.gain_axes), gain, 1)
    key = None if picked.key is None else _folded(picked.key, along_rows(number, picked.key_axes))
    return dataclasses.replace(picked, b=b, gain=gain, key=key, row=None)


def with_scale_in_b(lazy: LazyWeight) -> LazyWeight:
    """Return the weight with `scale · B` in the place of B."""
    if lazy.scale is None:
        return lazy
    dtype = accumulator(lazy.a.dtype, lazy.b.dtype)
    order = [axis for axis in lazy.b_axes if axis in lazy.scale_axes]
    scale = named_axes.arrange(lazy.scale.astype(dtype), lazy.scale_axes, order, {})
    sizes = [n if axis in order else 1 for axis, n in zip(lazy.b_axes, lazy.b.shape, strict=True)]
    b = lazy.b.astype(dtype) * scale.reshape(sizes)
    return dataclasses.replace(lazy, b=b, scale=None, scale_axes=())


def along_rows(x: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """Return an array `[rows]` with ones for the other ones of these axes; one row's as it is."""
    return x.reshape([-1 if axis == ROW else 1 for axis in axes]) if x.ndim else x


def _folded(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Return other keys for each row: two rows of one adapter do not drop the same inputs."""
    numbers = jnp.broadcast_to(number, keys.shape).reshape(-1)
    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), numbers).reshape(keys.shape)
