"""`Placement`: the rule by which the factors of a weight are sharded as the weight is."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.core.errors import ConfigError
from lora_jax.core.sharding.data_axes import DataAxes, data_axes, named_sharding
from lora_jax.core.weights import Adapted, TrainedLeaf, TrainedRows


def entries_of_fields(
    node: Adapted, entries: Sequence[Any], axes: DataAxes, slots: str | None = None
) -> dict[str, tuple[Any, ...]]:
    """Return how each array of a node is sharded whose weight is sharded as `entries` say.

    A `[*batch, *in, rank]` and B `[*batch, rank, *out]` take the entries of the axes that they
    have, without the mesh axes that shard examples, and so do scale, magnitude and trained rows.
    The rank is never sharded. A fully trained leaf is sharded as its base is. In a stack of
    adapters the slots come first.

    Args:
      node: an adapted node; of its arrays only the number of axes matters.
      entries: one entry of a `PartitionSpec` per axis of the weight; empty if it has none.
      axes: the mesh axes that shard examples.
      slots: the mesh axis that shards the slots of a stack, and nothing else of it.

    >>> from lora_jax import Layout, LoraWeight
    >>> node = LoraWeight(None, None, None, None, layout=Layout("io"))
    >>> fields = entries_of_fields(node, ("fsdp", "tensor"), DataAxes())
    >>> fields["a"], fields["b"]
    ((None, None), (None, 'tensor'))
    """
    one = _entries_of_one(node, entries, axes)
    if node.slots is None or (slots is None and not entries):
        return one
    taken = DataAxes(frozenset() if slots is None else frozenset({slots}))
    return {
        field: found if field == "w" else (slots, *(taken.removed(x, True) for x in found))
        for field, found in one.items()
    }


def _entries_of_one(
    node: Adapted, entries: Sequence[Any], axes: DataAxes
) -> dict[str, tuple[Any, ...]]:
    if isinstance(node, TrainedLeaf):
        return {"w": tuple(entries), "value": tuple(entries), "scale": (), "slot": ()}
    if not entries:
        return dict.fromkeys(("w", "a", "b", "scale", "magnitude", "key", "slot", "value"), ())
    batch_axes = node.layout.positions("b")
    kept = [axes.removed(x, is_batch=i in batch_axes) for i, x in enumerate(entries)]
    if isinstance(node, TrainedRows):
        value = tuple(None if i == node.axis else kept[i] for i in node.order)
        return {"w": tuple(entries), "value": value, "scale": (), "slot": ()}
    batch, ins, outs = ([kept[i] for i in node.layout.positions(kind)] for kind in "bio")
    return {
        **{"w": tuple(entries), "a": (*batch, *ins, None), "b": (*batch, None, *outs)},
        **{"scale": (*batch,), "magnitude": (*batch, *outs), "key": (*batch,), "slot": ()},
    }


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of adapted nodes belong: on the meshes on which their weights lie."""

    axes: DataAxes
    mesh: Any = None  # of a weight that lies on no mesh itself
    slots: str | None = None  # the mesh axis of the slots of stacks

    @classmethod
    def of(
        cls,
        caller: str,
        weights: Iterable[Any],
        fsdp: Any = None,
        batch: Any = (),
        slots: str | None = None,
    ) -> "Placement":
        """Return the placement for a base with these leaves; the arguments are `data_axes`'s.

        Raises:
          ConfigError: no mesh on which a weight lies has the axis `slots`; or as `data_axes`.
        """
        weights = list(weights)
        meshes = {x.mesh for x in map(named_sharding, weights) if x is not None}
        known = {name for mesh in meshes for name in mesh.axis_names}
        if slots is not None and slots not in known:
            have = f"they have {', '.join(sorted(known))}" if known else "they are on no mesh"
            raise ConfigError(
                f"{caller}: slots={slots!r} is not an axis of the weights' mesh; {have}"
            )
        mesh = meshes.pop() if len(meshes) == 1 else None
        return cls(data_axes(caller, fsdp, weights, batch), mesh, slots)

    def shardings(self, node: Adapted, w: Any) -> dict[str, NamedSharding] | None:
        """Return the sharding of each array of a node with the base leaf `w`, by field.

        None where `w` is on no mesh, and not to be put on one.
        """
        own = named_sharding(w)
        if own is None and (self.mesh is None or not _may_go_anywhere(w)):
            return None
        mesh = self.mesh if own is None else own.mesh
        spec = PartitionSpec() if own is None else own.spec
        ndim = len(w.shape)
        entries = (*spec, *(None for _ in range(ndim - len(spec)))) if any(spec) else ()
        fields = entries_of_fields(node, entries, self.axes, self.slots)
        return {
            field: NamedSharding(mesh, _spec_of_shape(fields[field], x.shape, mesh))
            for field, x in arrays_of(node).items()
            if field != "w"
        }

    def place(self, node: Adapted, w: Any) -> Any:
        """Return a node of the base leaf `w` with its arrays, except `w`, where they belong."""
        shardings = self.shardings(node, w)
        if shardings is None:
            return node
        arrays = arrays_of(node)
        placed = {field: put(arrays[field], sharding) for field, sharding in shardings.items()}
        return dataclasses.replace(node, **placed)


def arrays_of(node: Adapted) -> Mapping[str, Any]:
    """Return the arrays of a node by field; those that it does not have are left out."""
    names = (f.name for f in dataclasses.fields(node) if "static" not in f.metadata)
    return {name: x for name in names if (x := getattr(node, name)) is not None}


def _may_go_anywhere(w: Any) -> bool:
    """Return whether an array is not bound to a device: `jit` takes it to those of the others."""
    if isinstance(w, jax.core.Tracer):
        return False
    return not isinstance(w, jax.Array) or not w.committed


def _spec_of_shape(entries: Sequence[Any], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Return the specification, without the axes that the mesh does not divide evenly."""

    def parts(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else (entry,)
        return math.prod(mesh.shape[name] for name in names if name is not None)

    fitting = [x if size % parts(x) == 0 else None for x, size in zip(entries, shape, strict=False)]
    while fitting and fitting[-1] is None:
        fitting.pop()  # as compiled functions write the shardings of their results
    return PartitionSpec(*fitting)


def put(x: Any, sharding: NamedSharding) -> Any:
    """Return an array, or what stands for one, with this sharding."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if isinstance(x, jax.core.Tracer):
        if AxisType.Explicit in sharding.mesh.axis_types:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    local = not isinstance(x, jax.Array) or x.is_fully_addressable
    if local and not sharding.is_fully_addressable:
        # Each process has the whole array, and they are the same: none needs another's.
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])
    return jax.device_put(x, sharding)
