"""Slots with similar ranks computed together, so that small ranks are not padded to the largest."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.sweeps.state import SweepState
from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError
from lora_jax.core.slots import slot_rank
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import Adapted, LoraWeight


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The largest rank that each slot may have; slots with the same one are a bucket."""

    limits: tuple[int, ...]  # per slot
    at_once: int | None = None  # how many slots are computed at once; None for all of a bucket

    @classmethod
    def of(
        cls, bounds: Sequence[int], ranks: Sequence[int], slots: int, at_once: int | None = None
    ) -> "Buckets":
        """Return the buckets of runs with these ranks, the first of which are in the slots.

        >>> Buckets.of([8], ranks=[4, 16, 8, 64], slots=3).limits
        (8, 64, 8)
        """
        if not all(is_integer(bound) and bound > 0 for bound in bounds):
            raise ConfigError(f"sweep: buckets must be ranks, positive integers, got {bounds!r}")
        if at_once is not None and (not is_integer(at_once) or at_once < 1):
            raise ConfigError(f"sweep: at_once must be a positive integer or None, got {at_once!r}")
        every = sorted({*map(int, bounds), max(ranks)})
        limits = tuple(next(b for b in every if b >= rank) for rank in ranks[:slots])
        if max(limits) < max(ranks):
            raise ConfigError(
                f"sweep: no slot has room for rank {max(ranks)}: put a run of the largest bucket "
                "among the first ones, or leave buckets= out"
            )
        return cls(limits, at_once)

    def check_fits(self, adapters: Any, slot: Any) -> None:
        """Raise if adapters have a larger rank than their slot allows."""
        if len(set(self.limits)) == 1:
            return
        rank, slot = rank_of(adapters), int(slot)
        if rank > self.limits[slot]:
            fitting = [i for i, limit in enumerate(self.limits) if limit >= rank]
            raise ConfigError(
                f"sweep: rank {rank} does not fit slot {slot}, whose bucket ends at rank "
                f"{self.limits[slot]}; the slots {fitting} have room for it"
            )

    def turns(self, ranks: Sequence[int]) -> list[dict[int, int]]:
        """Return in which turn and slot each of these ranks trains: `{index of the rank: slot}`.

        >>> Buckets((8, 64, 8)).turns([64, 16, 4, 8])
        [{0: 1, 2: 0, 3: 2}, {1: 1}]
        """
        waiting, turns = list(range(len(ranks))), []
        while waiting:
            free = sorted(range(len(self.limits)), key=lambda slot: self.limits[slot])
            turn: dict[int, int] = {}
            for index in waiting:
                slot = next((s for s in free if self.limits[s] >= ranks[index]), None)
                if slot is not None:
                    turn[index] = slot
                    free.remove(slot)
            turns.append(turn)
            waiting = [index for index in waiting if index not in turn]
        return turns

    def map(
        self,
        step: Callable[..., tuple[SweepState, Any]],
        init_optimizer: Callable[[Any, Any], Any],
        axes: Sequence[Any],
        state: SweepState,
        *batch: Any,
    ) -> tuple[SweepState, Any]:
        """Return the next states of all slots, and what their steps measured.

        Args:
          step: `(state, *batch) -> (state, measured)` of one slot.
          init_optimizer: `(numbers, adapters) -> state`, whose shapes follow those of the adapters.
          axes: which axes of the batch are the axis of slots, as `in_axes` of `jax.vmap`.
          state: the states.
          *batch: the other arguments of `step`.
        """
        every = functools.partial(map_slots, step, axes, self.at_once)
        if len(set(self.limits)) == 1:
            return every(state, *batch)
        found, order = [], []
        for limit in sorted(set(self.limits)):
            slots = [slot for slot, own in enumerate(self.limits) if own == limit]
            few = _cut(_taken(slots, 0, state), limit, init_optimizer)
            own = [_taken(slots, axis, x) for axis, x in zip(axes, batch, strict=True)]
            few, measured = every(few, *own)
            state = jax.tree.map(functools.partial(_written, slots), state, few)
            found.append(measured)
            order += slots
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
        return state, _taken(np.argsort(order).tolist(), 0, joined)


def rank_of(adapters: Any) -> int:
    """Return the largest rank of single adapters, without their padding."""
    nodes = [x for x in adapted_nodes(adapters).values() if isinstance(x, LoraWeight)]
    return max((x.rank if x.slot is None else int(slot_rank(x.slot)) for x in nodes), default=0)


def map_slots(
    fn: Callable[..., Any], axes: Sequence[Any], at_once: int | None, state: Any, *batch: Any
) -> Any:
    """Return `fn(state, *batch)` for every slot, of which so many are computed at once.

    It is one slot after another where JAX has no rule for `vmap`, as for `ragged_dot` of different
    activations with the same weights.
    """
    try:
        return _map_some(fn, axes, at_once, state, *batch)
    except NotImplementedError:
        return _map_some(fn, axes, 1, state, *batch)


def _map_some(
    fn: Callable[..., Any], axes: Sequence[Any], at_once: int | None, state: Any, *batch: Any
) -> Any:
    if at_once is None or 1 < len(jax.tree.leaves(state)[0]) <= at_once:
        return jax.vmap(fn, (0, *axes))(state, *batch)
    leaves, treedef = jax.tree.flatten(batch)
    nothing = lambda x: x is None
    where = jax.tree.leaves(jax.tree.broadcast(tuple(axes), batch, nothing), is_leaf=nothing)
    pairs = list(zip(leaves, where, strict=True))
    own = [jnp.moveaxis(x, axis, 0) for x, axis in pairs if axis is not None]

    def one(slot: tuple[Any, Sequence[jax.Array]]) -> Any:
        state, mine = slot
        rest = iter(mine)
        given = [x if axis is None else next(rest) for x, axis in pairs]
        return fn(state, *jax.tree.unflatten(treedef, given))

    return jax.lax.map(one, (state, own), batch_size=None if at_once == 1 else at_once)


def _taken(slots: Sequence[int], axes: Any, tree: Any) -> Any:
    """Return the arrays of some slots; `axes` says where these are, as `in_axes` of `jax.vmap`."""

    def under(axis: int | None, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda x: pick(jnp.asarray(x), axis), part)

    def pick(x: jax.Array, axis: int) -> jax.Array:
        if _are_adjacent(slots):
            return jax.lax.slice_in_dim(x, slots[0], slots[0] + len(slots), axis=axis)
        return jnp.take(x, np.array(slots), axis=axis)

    return jax.tree.map(under, axes, tree, is_leaf=lambda x: x is None)


def _are_adjacent(slots: Sequence[int]) -> bool:
    return list(slots) == list(range(slots[0], slots[0] + len(slots)))


def _cut(state: SweepState, rank: int, init_optimizer: Callable[[Any, Any], Any]) -> SweepState:
    """Return states without what lies behind a rank: the padding of factors, and what it has."""

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        before = (slice(None),) * (1 + len(node.layout.positions("b")))
        return dataclasses.replace(node, a=node.a[..., :rank], b=node.b[(*before, slice(rank))])

    adapters = map_adapted(one, state.adapters)
    shapes = jax.eval_shape(jax.vmap(init_optimizer), state.numbers, adapters)
    first = lambda x, like: x[tuple(map(slice, like.shape))]
    optimizer = jax.tree.map(first, state.optimizer, shapes)
    return dataclasses.replace(state, adapters=adapters, optimizer=optimizer)


def _written(slots: Sequence[int], x: jax.Array, part: jax.Array) -> jax.Array:
    """Return `x` with the arrays of some slots replaced as far as they go."""
    if _are_adjacent(slots):
        return jax.lax.dynamic_update_slice(x, part, (slots[0], *(0 for _ in x.shape[1:])))
    return x.at[(np.array(slots), *map(slice, part.shape[1:]))].set(part)
