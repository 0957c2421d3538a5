"""Arrays on meshes with explicit axes, where a program must say how each result is sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def has_explicit_mesh(x: Any) -> bool:
    """Return whether an array lies on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def gathered(x: Any) -> Any:
    """Return `x` whole on every device, if it is sharded along explicit axes; else `x` itself.

    Decompositions take only whole matrices there. Along automatic axes the compiler gathers them.
    """
    if not isinstance(x, jax.Array) or not has_explicit_mesh(x):
        return x
    sharding = jax.typeof(x).sharding
    whole = PartitionSpec(*(None for _ in x.shape))
    return (
        x
        if sharding.spec == whole
        else jax.sharding.reshard(x, NamedSharding(sharding.mesh, whole))
    )


def automatic(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `fn` of one array, with scalars for results, for arrays on any mesh.

    On a mesh with explicit axes the compiler shards what `fn` computes, as on any other mesh.
    """

    def call(x: Any) -> Any:
        if not has_explicit_mesh(x):
            return fn(x)
        return jax.sharding.auto_axes(fn, out_sharding=PartitionSpec())(x)

    return call
