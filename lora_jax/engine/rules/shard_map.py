"""`shard_map`, rebuilt around lazy weights: factors are sharded along the axes they share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.core.sharding.meshes import is_sharded
from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, Axis, LazyWeight, is_lazy
from lora_jax.engine.quantized.specs import divides, view_of_specs
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.registry import Container, PrimitiveRule, Walk, rule
from lora_jax.engine.rules.views import view_of

RULES: dict[str, PrimitiveRule] = {}
CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "shard_map")
def _shard_map(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> Any:
    """Derive the spec of each factor from the weight's, axis by axis."""
    arguments = jaxprs.shard_map_arguments(eqn)
    mesh, specs = arguments["mesh"], arguments.pop("in_specs")
    if any(is_lazy(x) and (s.unreduced or s.reduced) for x, s in zip(args, specs, strict=True)):
        return NotImplemented  # a sum of shards is not a view of the weight
    jaxpr, consts = jaxprs.open_jaxpr(eqn.params["jaxpr"])
    args = [
        ctx.densify(x, eqn) if is_lazy(x) and _splits_inputs(x, s) else x
        for x, s in zip(args, specs, strict=True)
    ]
    args = [_in_whole_blocks(ctx, eqn, x, s, mesh) for x, s in zip(args, specs, strict=True)]
    placed = [_specs(x, s, mesh) if is_lazy(x) else s for x, s in zip(args, specs, strict=True)]
    arrays, treedef = jax.tree.flatten(list(args))
    flat_specs = jax.tree.leaves(placed, is_leaf=_is_spec)

    def body(*arrays: Any) -> list[Any]:
        shards = jax.tree.unflatten(treedef, arrays)
        shards = [
            dataclasses.replace(x, shape=var.aval.shape) if is_lazy(x) else x
            for x, var in zip(shards, jaxpr.invars, strict=True)
        ]
        outs = walk(jaxpr, consts, shards)
        return [ctx.densify(x, eqn, " (it is returned)") if is_lazy(x) else x for x in outs]

    arguments["out_specs"] = list(arguments["out_specs"])
    mapped = jax.shard_map(body, in_specs=tuple(flat_specs), **arguments)
    arrays = [_reshard(x, mesh, s) for x, s in zip(arrays, flat_specs, strict=True)]
    return mapped(*arrays)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _in_whole_blocks(ctx: Context, eqn: Any, x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """Return a weight, dequantized where a device's part is not whole codes and scales."""
    if not is_lazy(x) or not isinstance(x.w, QuantizedView):
        return x
    if x.w.is_movable and divides(x.w.weight, spec, mesh.shape):
        return x
    return ctx.dequantize(x, eqn, " (the shards are not whole blocks of it)")


def _specs(lazy: LazyWeight, spec: PartitionSpec, mesh: Any) -> LazyWeight:
    """Return the weight with a spec in place of each member, by the names of its axes."""
    specs: dict[str, Any] = {"w": None if lazy.w is None else spec}
    if isinstance(lazy.w, QuantizedView):
        specs["w"] = view_of_specs(lazy.w, spec, mesh.shape)
    for name, axes in MEMBERS:
        if getattr(lazy, name) is not None:
            specs[name] = _spec_of(lazy, spec, getattr(lazy, axes))
    specs["row"] = jax.tree.map(lambda _: PartitionSpec(), lazy.row)
    return dataclasses.replace(lazy, **specs)


def _spec_of(lazy: LazyWeight, spec: PartitionSpec, axes: Sequence[Axis]) -> PartitionSpec:
    """Return the spec of an array with these axes, sharded along those of the view as `spec`."""
    entries = [*spec, *[None] * (len(lazy.axes) - len(spec))]
    where = dict(zip(lazy.axes, entries, strict=True))
    return PartitionSpec(*(where.get(axis) for axis in axes))


def _splits_inputs(lazy: LazyWeight, spec: PartitionSpec) -> bool:
    """Return whether inputs are sharded, so that no device would observe a whole one."""
    parted = [axis for axis, entry in zip(lazy.axes, spec, strict=False) if entry is not None]
    return bool(lazy.probe) and any(a in lazy.a_axes and a not in lazy.b_axes for a in parted)


def _reshard(x: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """Reshard `x` as `spec` says, where the mesh makes the sharding part of the type."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if explicit else x


@rule(RULES, "reshard")
def _reshard_weight(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Move every member to the mesh; a factor is sharded there only if it was sharded before."""
    (lazy,) = args
    wanted = eqn.params["dst_sharding"]

    def one(x: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        spec = _spec_of(lazy, wanted.spec, axes) if is_sharded(x) else PartitionSpec()
        return jaxprs.bind(eqn, [x], dst_sharding=wanted.update(spec=spec))[0], axes

    return view_of(eqn, lazy.map_members(one), lazy.axes)


@rule(RULES, "pvary")
def _pvary(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Make the factors vary as the base does; a tangent has no base that shows it."""
    (lazy,) = args
    mesh_axes = eqn.params["axes"]
    return view_of(
        eqn, lazy.map_members(lambda x, axes: (jaxprs.make_varying(x, mesh_axes), axes)), lazy.axes
    )


@rule(RULES, "all_gather", "all_gather_invariant")
def _all_gather(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Gather the factors that have the gathered axis.

    The other factor must be the same on every device along the mesh axis.
    """
    (lazy,) = args
    params = eqn.params
    mesh_axes = params["axis_name"]
    mesh_axes = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
    if not params["tiled"] or params["axis_index_groups"] is not None:
        return NotImplemented
    at = params["all_gather_dimension"]
    old, new = lazy.axes[at], lazy.new_axis(lazy.axes[at].origins)
    if lazy.a is not None:
        varying = {n for n, _ in MEMBERS if _varies(getattr(lazy, n), mesh_axes)}
        if not varying or varying != set(lazy.holders(old)):
            return NotImplemented
    gathered = lazy.map_axis(
        old, lambda x, i: jaxprs.bind(eqn, [x], all_gather_dimension=i)[0], new
    )
    return view_of(eqn, gathered, [*lazy.axes[:at], new, *lazy.axes[at + 1 :]])


def _varies(x: Any, mesh_axes: Sequence[Any]) -> bool:
    return x is not None and jaxprs.varies_over(x, mesh_axes)
