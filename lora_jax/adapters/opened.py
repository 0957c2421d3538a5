"""Adapted and quantized nodes as plain dictionaries of arrays, for the state of an optimizer.

`nnx.Optimizer` takes the state apart down to each array and rebuilds only dictionaries; and
`flax.serialization` knows only these. So optax sees `{"w": ..., "a": ..., "b": ..., "scale": ...}`
where the parameters have a `LoraWeight`, and `{"codes": ..., "scales": ...}` for quantized ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax.core.boxes import axis_names, is_box, is_variable, opened, with_axis_names
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized
from lora_jax.core.sharding.data_axes import DataAxes, as_names
from lora_jax.core.sharding.placement import entries_of_fields
from lora_jax.core.sharding.quantized import entries_by_field
from lora_jax.core.weights import (
    Adapted,
    LoraWeight,
    TrainedLeaf,
    TrainedRows,
    is_adapted,
    is_weight,
)


def open_nodes(tree: Any) -> Any:
    """Return `tree` with a dictionary for each adapted or quantized node, else the same objects.

    Each array of a node in an `nnx.Variable` gets its own variable of the same class.

    >>> import jax.numpy as jnp
    >>> from lora_jax import TrainedLeaf
    >>> sorted(open_nodes({"bias": TrainedLeaf(jnp.zeros(3), jnp.ones(3), jnp.ones(()))})["bias"])
    ['scale', 'value', 'w']
    """

    def one(unit: Any) -> Any:
        node, put = opened(unit)
        names = axis_names(unit)
        boxed = lambda x, names: x
        if names is not None:
            boxed = lambda x, names: with_axis_names(unit, x, names)
        elif is_variable(unit):
            boxed = lambda x, names: put(x)

        def codes(w: QuantizedWeight) -> dict[str, Any]:
            own = entries_by_field(w, names or ())
            return {name: boxed(x, own[name]) for name, x in w.fields.items()}

        if is_quantized(node):
            return codes(node)
        if not is_adapted(node):
            return unit
        own = entries_of_fields(node, names or (), DataAxes())
        fields = {f: None if x is None else boxed(x, own[f]) for f, x in _fields(node).items()}
        if node.slot is None:
            del fields["slot"]  # the state of an optimizer is as it was before there were stacks
        return fields | ({"w": codes(node.w)} if is_quantized(node.w) else {})

    return jax.tree.map(one, tree, is_leaf=_is_unit)


def partition_specs(
    params: Any, *, fsdp: str | Sequence[str] | None = None, slots: str | None = None
) -> Any:
    """Return the `PartitionSpec` of each leaf, from the axis names in Flax's boxes.

    Linen's `nn.get_partition_spec` and NNX's `nnx.get_partition_spec` know one box, and so one
    specification, for a whole adapted weight. Here A `[*batch, *in, rank]` and B
    `[*batch, rank, *out]` take those names that belong to their axes, without the names of axes
    that shard the examples, and scale and magnitude do, too; the rank has no name. The arrays of a
    quantized weight have its names. A leaf without a box has `PartitionSpec()`. For arrays that lie
    on a mesh already, see `shardings`.

    Args:
      params: a joined tree or an overlay, of arrays or `ShapeDtypeStruct`s, whose leaves are
        Linen's `Partitioned` or `LogicallyPartitioned`, or NNX variables with `out_sharding`.
      fsdp: the names that A and B do without, as for `init`: also logical ones that stand for such
        a mesh axis, ("embed",). None means `data`, `fsdp`, `dp`, `ddp`, `batch` and `replica`.

    Returns:
      A tree without boxes, with adapted nodes of `PartitionSpec`s. Logical names stay, for
      `nn.logical_to_mesh`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": nn.Partitioned(jnp.ones((4, 3)), names=("data", "model"))}
    >>> params = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=2))
    >>> specs = partition_specs(params)["kernel"]
    >>> specs.w, specs.a, specs.b, specs.scale
    (P('data', 'model'), P(None, None), P(None, 'model'), P())
    """

    axes = DataAxes(None if fsdp is None else as_names("partition_specs", fsdp))

    def one(unit: Any) -> Any:
        node, _ = opened(unit)
        names = axis_names(unit) or ()
        if not is_adapted(node):
            return _specs(node, names)
        own = entries_of_fields(node, names, axes, slots)
        fields = {field: x for field, x in _fields(node).items() if x is not None}
        return dataclasses.replace(node, **{f: _specs(x, own[f]) for f, x in fields.items()})

    return jax.tree.map(one, params, is_leaf=lambda x: is_box(x) or is_weight(x))


def _specs(x: Any, names: Sequence[Any]) -> Any:
    """Return the specification of an array, or of each array of a quantized weight."""
    if not is_quantized(x):
        return PartitionSpec(*names)
    own = entries_by_field(x, names)
    return dataclasses.replace(x, fields={n: PartitionSpec(*own[n]) for n in x.fields})


def close_nodes(tree: Any, like: Any) -> Any:
    """Return what `open_nodes` made of a tree such as `like` with the nodes of that tree again."""

    def one(unit: Any, part: Any) -> Any:
        node, put = opened(unit)
        if is_quantized(node):
            return put(_with_codes(node, part))
        if not is_adapted(node):
            return part
        fields = {name: opened(x)[0] for name, x in part.items()}
        if is_quantized(node.w):
            fields["w"] = _with_codes(node.w, part["w"])
        return put(dataclasses.replace(node, **fields))

    return jax.tree.map(one, like, tree, is_leaf=_is_unit)


def _with_codes(w: QuantizedWeight, part: Mapping[str, Any]) -> QuantizedWeight:
    return dataclasses.replace(w, fields={name: opened(x)[0] for name, x in part.items()})


def opened_class(x: Any) -> type[Adapted] | None:
    """Return the class of node that `open_nodes` made the dictionary `x` of; None for all else."""
    if isinstance(x, dict):
        for kind in (LoraWeight, TrainedLeaf, TrainedRows):
            if {*x, "slot"} == set(_field_names(kind)):
                return kind
    return None


def _is_unit(x: Any) -> bool:
    return is_weight(opened(x)[0])


def _fields(node: Adapted) -> dict[str, Any]:
    """Return the leaves of a node by name."""
    return {name: getattr(node, name) for name in _field_names(type(node))}


def _field_names(kind: type[Adapted]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if "static" not in f.metadata)
