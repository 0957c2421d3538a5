"""Arrays on meshes with explicit axes, where a program must say how each result is sharded."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def has_explicit_mesh(x: Any) -> bool:
    """Return whether an array lies on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def is_on_mesh(x: Any) -> bool:
    """Return whether an array lies on a mesh of more than one device, also under tracing.

    It may be replicated there. Within `shard_map` it is a device's own: axes that are manual do not
    count.

    >>> import jax.numpy as jnp
    >>> is_on_mesh(jnp.zeros(3))
    False
    """
    mesh = jax.typeof(x).sharding.mesh
    types = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind is not AxisType.Manual for size, kind in types)


def platform_of(x: Any) -> str | None:
    """Return the platform of the mesh that an array lies on, also under tracing; None without one.

    >>> import jax.numpy as jnp
    >>> platform_of(jnp.zeros(3)) is None
    True
    """
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    return getattr(device, "platform", None)


def gathered(x: Any) -> Any:
    """Return `x` whole on every device, if it is sharded along explicit axes; else `x` itself.

    Decompositions take only whole matrices there. Along automatic axes the compiler gathers them.
    """
    if not isinstance(x, jax.Array) or not has_explicit_mesh(x):
        return x
    sharding = jax.typeof(x).sharding
    whole = PartitionSpec(*(None for _ in x.shape))
    if sharding.spec == whole:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, whole))


def automatic(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `fn` of one array or tree, with scalars for results, for arrays on any mesh.

    On a mesh with explicit axes the compiler shards what `fn` computes, as on any other mesh.
    """

    def call(x: Any) -> Any:
        if not any(map(has_explicit_mesh, jax.tree.leaves(x))):
            return fn(x)
        return jax.sharding.auto_axes(fn, out_sharding=PartitionSpec())(x)

    return call


def is_sharded(x: Any) -> bool:
    """Return whether the type of `x` says that it is sharded."""
    return any(jax.typeof(x).sharding.spec)


def on_mesh_of(x: jax.Array, like: Any) -> jax.Array:
    """Return `x`, replicated on the explicit mesh of `like` where `x` is on none.

    Its gradient is then summed over the mesh. JAX cannot sum it for an array that is on no mesh.
    """
    if jax.typeof(like).sharding.mesh.empty or not jax.typeof(x).sharding.mesh.empty:
        return x
    return _replicate(x, like)


@jax.jit(keep_unused=True)
def _replicate(x: jax.Array, like: Any) -> jax.Array:
    # `like` tells jit the devices, which the mesh in a type does not know.
    mesh = jax.typeof(like).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def reshard_like(x: jax.Array, like: Any) -> jax.Array:
    """Return `x` with the sharding that the type of `like` says."""
    mine, wanted = jax.typeof(x).sharding, jax.typeof(like).sharding
    if mine.spec == wanted.spec or wanted.mesh.empty:
        return x
    return jax.sharding.reshard(x, wanted)


def sharding_without(x: Any, *axes: int) -> NamedSharding | None:
    """Return the sharding that the type of `x` says, if any, with these axes not sharded."""
    if not is_sharded(x):
        return None
    return unshard(jax.typeof(x).sharding, *axes)


def unshard(sharding: NamedSharding, *axes: int) -> NamedSharding:
    """Return the sharding with these axes not sharded."""
    entries = [None if i in axes else entry for i, entry in enumerate(sharding.spec)]
    return sharding.update(spec=PartitionSpec(*entries))


def sharding_of_product(
    operands: Sequence[tuple[Any, Sequence[Hashable]]], out_names: Sequence[Hashable]
) -> NamedSharding | None:
    """Return how a product is sharded whose operands have named axes; None where nothing says it.

    An axis of the result is sharded as in the first operand that shards it. JAX asks for this
    where an axis is sharded that is summed over, or one mesh axis shards both operands.
    """
    sharded = [(x, names) for x, names in operands if is_sharded(x)]
    if not sharded:
        return None
    where: dict[Hashable, Any] = {}
    for x, names in sharded:
        for name, entry in zip(names, jax.typeof(x).sharding.spec, strict=True):
            where[name] = where.get(name) or entry
    mesh = jax.typeof(sharded[0][0]).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*_each_once([where.get(n) for n in out_names])))


def einsum(subscripts: str, x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
    """Return `jnp.einsum(subscripts, x, y)`, sharded as `sharding_of_product` says."""
    operands, _, out = subscripts.partition("->")
    pairs = list(zip((x, y), operands.split(","), strict=True))
    sharding = sharding_of_product(pairs, out)
    return jnp.einsum(subscripts, x, y, out_sharding=sharding, **options)


def _each_once(entries: Sequence[Any]) -> list[Any]:
    """Return the entries of a spec, without those whose mesh axes an earlier one has."""
    used: set[Any] = set()
    kept = []
    for entry in entries:
        axes = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        kept.append(None if axes & used else entry)
        used |= axes
    return kept
