"""`SweepState`: all that a step of a sweep changes, with the slots as the first axis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import put


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweepState:
    """The adapters of a sweep, their optimizer states and settings; every leaf is `[slots, ...]`.

    It is a pytree of plain arrays. What a run may set is data here, so another run in a slot needs
    no recompilation.
    """

    adapters: Any  # a stack, see `stack`
    optimizer: Any  # the optax states
    numbers: Mapping[str, jax.Array]  # [slots] each: learning_rate, weight_decay, b_ratio, ...
    seed: jax.Array  # int32 [slots]
    step: jax.Array  # int32 [slots]: the steps that each run has made

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.step.shape[0]


def stack_states(states: Sequence[SweepState]) -> SweepState:
    """Return the states of single slots as one; what lies on a mesh stays sharded there."""
    meshes = {s.mesh for x in jax.tree.leaves(states[0]) if (s := named_sharding(x)) is not None}
    mesh = meshes.pop() if len(meshes) == 1 else None

    def one(*leaves: Any) -> Any:
        stacked = jnp.stack(leaves)
        own = named_sharding(leaves[0])
        if own is not None:
            return put(stacked, NamedSharding(own.mesh, PartitionSpec(None, *own.spec)))
        return stacked if mesh is None else put(stacked, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, *states)


def shardings_of(state: SweepState) -> Any:
    """Return the sharding of every array of a state on a mesh; None where it lies on no mesh."""
    found = [named_sharding(x) for x in jax.tree.leaves(state)]
    if any(x is None for x in found):
        return None
    return jax.tree.unflatten(jax.tree.structure(state), found)
