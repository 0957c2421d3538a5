"""Slots of a stack: the numbers that each adapter has there, and how to pick adapters by slot."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError
from lora_jax.core.weights import Adapted, LoraWeight


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


def has_magnitude(node: Adapted) -> bool:
    """Return whether an adapter has a magnitude; one from a stack may only have its place."""
    if not isinstance(node, LoraWeight) or node.magnitude is None:
        return False
    return not is_known(node) or bool(slot_has_magnitude(node.slot).any())


def is_present(node: Adapted) -> Any:
    """Return whether a node from a stack is an adapter, boolean `[]`, of a stack `[slots]`.

    A slot whose adapter has no such target is none. What never was in a stack is one.
    """
    if node.slot is None:
        return np.True_
    return (slot_rank(node.slot) if isinstance(node, LoraWeight) else node.slot) > 0


def is_known(node: Adapted) -> bool:
    """Return whether the numbers of a node's slot have values, so that shapes may follow them."""
    return isinstance(node.slot, jax.Array | np.ndarray) and not isinstance(
        node.slot, jax.core.Tracer
    )


def unpadded(node: Adapted) -> Adapted | None:
    """Return a single adapter as it was before it was stacked; None if that slot had none.

    A stack stays as it is, and so does an adapter whose slot has no values: a tracer, or a shape.
    """
    if node.slots is not None or not is_known(node):
        return node
    if not is_present(node):
        return None
    if not isinstance(node, LoraWeight):
        return dataclasses.replace(node, slot=None)
    rank, batch = int(slot_rank(node.slot)), len(node.layout.positions("b"))
    return dataclasses.replace(
        node,
        a=node.a[..., :rank],
        b=node.b[(*(slice(None) for _ in range(batch)), slice(rank))],
        magnitude=node.magnitude if slot_has_magnitude(node.slot) else None,
        slot=None,
        dropout=_shortest(slot_dropout(node.slot), node.dropout),
    )


def _shortest(rate: Any, highest: float) -> float:
    """Return the number that a rate in float32 was made of."""
    same = np.float32(rate) == np.float32(highest)
    return highest if same else float(np.format_float_positional(np.float32(rate), unique=True))


def all_unpadded(nodes: Mapping[str, Adapted]) -> dict[str, Adapted]:
    """Return those of these single adapters that their slots have, as they were before."""
    found = {path: unpadded(node) for path, node in nodes.items()}
    return {path: node for path, node in found.items() if node is not None}


def without_slots(node: Adapted, fn: Any) -> Any:
    """Return `fn(node)`, of a stack `fn` of each of its adapters, along a first axis."""
    if node.slots is None:
        return fn(node)
    adapters = dataclasses.replace(node, w=None)
    return jax.vmap(lambda x: fn(dataclasses.replace(x, w=node.w)))(adapters)


def pick_slot(node: Adapted, ids: jax.Array) -> Adapted:
    """Return the adapters of a stacked node in these slots; where an id is -1, one that is none."""
    taken = jax.tree.map(lambda x: x[jnp.maximum(ids, 0)], dataclasses.replace(node, w=None))
    scale, slot = (_where_on(ids, x) for x in (taken.scale, taken.slot))
    return dataclasses.replace(taken, scale=scale, slot=slot, w=node.w)


def _where_on(ids: jax.Array, x: Any) -> Any:
    if x is None:
        return None
    return jnp.where(jnp.expand_dims(ids >= 0, range(ids.ndim, x.ndim)), x, jnp.zeros_like(x))


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
