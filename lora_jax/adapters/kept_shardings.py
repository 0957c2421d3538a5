"""Gradients and optimizer states that are sharded as what trains, in a jitted step too.

The compiler chooses shardings within a jitted function, and may shard the gradient of a factor as
the weight is sharded. Then the state and the factors themselves would be, after the first step:
the second would compile again, and gather them.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import arrays_of, put
from lora_jax.core.tree import adapted_nodes

#: The fields of adapted nodes that train.
TRAINED_FIELDS = ("a", "b", "magnitude", "value")

Shardings = Mapping[str, NamedSharding]  # by the path of an opened node's array: "up/kernel/a"


def shardings_of_trained(params: Any) -> Shardings:
    """Return how the arrays that train are sharded, of those that lie on a mesh."""
    found = {
        f"{path}/{field}" if path else field: named_sharding(x)
        for path, node in adapted_nodes(params).items()
        for field, x in arrays_of(node).items()
        if field in TRAINED_FIELDS
    }
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def keep_shardings(opened: Any, shardings: Shardings) -> Any:
    """Return a tree with opened nodes, such as gradients, with its arrays sharded like that.

    Only under tracing and along automatic axes: elsewhere arrays are sharded as they are.
    """
    if not shardings:
        return opened
    leaves, treedef = flatten_with_paths(opened)
    kept = [constrain(x, shardings.get(path)) for path, x in leaves.items()]
    return jax.tree_util.tree_unflatten(treedef, kept)


def constrain(x: Any, sharding: NamedSharding | None) -> Any:
    """Return an array sharded like that, under tracing and along automatic axes."""
    if sharding is None or not isinstance(x, jax.core.Tracer):
        return x
    mesh = jax.typeof(x).sharding.mesh
    if mesh.shape != sharding.mesh.shape or set(mesh.axis_types) != {AxisType.Auto}:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding.spec))


def replicated_on_mesh(shardings: Shardings) -> NamedSharding | None:
    """Return the sharding of an array that is whole on each device, if there is a single mesh."""
    meshes = {sharding.mesh for sharding in shardings.values()}
    return NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None


def place_state(state: Any, shardings: Shardings) -> Any:
    """Return a new optimizer state with all its arrays on the mesh of what trains.

    What is on no mesh, such as a count of steps, is replicated. Under tracing nothing is placed.
    """
    whole = replicated_on_mesh(shardings)
    if whole is None or set(whole.mesh.axis_types) != {AxisType.Auto}:
        return state

    def one(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
            return x
        return x if named_sharding(x) is not None or x.committed else put(x, whole)

    return jax.tree.map(one, state)
