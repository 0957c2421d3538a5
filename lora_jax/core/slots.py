"""Slots of a stack: the numbers that each adapter has there, and how to pick adapters by slot."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError
from lora_jax.core.weights import Adapted


def new_slot(rank: Any, dropout: Any, has_magnitude: Any) -> jax.Array:
    """Return the three numbers of a slot as one array, float32 `[3]`.

    >>> new_slot(4, 0.5, True)
    Array([4. , 0.5, 1. ], dtype=float32)
    """
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in (rank, dropout, has_magnitude)], -1)


def slot_rank(slot: jax.Array) -> jax.Array:
    """Return the rank, `[...]` of `[..., 3]`."""
    return slot[..., 0]


def slot_dropout(slot: jax.Array) -> jax.Array:
    """Return the rate of dropout, `[...]` of `[..., 3]`."""
    return slot[..., 1]


def slot_has_magnitude(slot: jax.Array) -> jax.Array:
    """Return whether the adapter has a magnitude, boolean `[...]` of `[..., 3]`."""
    return slot[..., 2] != 0


def pick_slot(node: Adapted, ids: jax.Array) -> Adapted:
    """Return the adapters of a stacked node in these slots, off where an id is -1."""
    taken = jax.tree.map(lambda x: x[jnp.maximum(ids, 0)], dataclasses.replace(node, w=None))
    on = jnp.expand_dims(ids >= 0, range(ids.ndim, taken.scale.ndim))
    scale = jnp.where(on, taken.scale, jnp.zeros_like(taken.scale))
    return dataclasses.replace(taken, scale=scale, w=node.w)


def check_ids(caller: str, ids: Any, slots: int, lowest: int = -1) -> jax.Array:
    """Return ids as int32, or raise unless each is from `lowest` to the number of slots."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"{caller}: ids must be integers, got {ids.dtype}")
    if not isinstance(ids, jax.core.Tracer):
        wrong = sorted({int(i) for i in np.ravel(ids) if not lowest <= i < slots})
        if wrong:
            base = ", and -1 is the base" if lowest < 0 else ""
            raise ConfigError(f"{caller}: no slots {wrong}; the stack has {slots}, from 0 on{base}")
    return jnp.asarray(ids, jnp.int32)
