"""The adapted leaves: `LoraWeight`, `TrainedLeaf` and `TrainedRows`."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from lora_jax.core.abstract import on_shapes
from lora_jax.core.errors import StructureError
from lora_jax.core.host_memory import on_device
from lora_jax.core.layout import Layout, subscripts
from lora_jax.core.not_an_array import NotAnArray
from lora_jax.core.quantized.parts import rows_of
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized, quantize_array
from lora_jax.core.sharding.meshes import sharding_without
from lora_jax.core.short_repr import describe_fields, describe_node, describe_value, has_arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight(NotAnArray):
    """Takes the place of a kernel `W` in a parameter tree, and means `W + scale · A · B`.

    LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685. With a
    `magnitude` it means `magnitude · V / ‖V‖`, where V is that sum and the norm is over the in axes
    of each output: DoRA, https://arxiv.org/abs/2402.09353. It is a pytree node: `w`, `a`, `b`,
    `scale`, `magnitude`, `key` and `slot` are leaves, and the rest is static. In an *overlay* (the
    adapters that `split` returns) `w` is None. In a *stack* of adapters every leaf but `w` has one
    more leading axis, the slots.

    >>> import jax.numpy as jnp
    >>> w, a, b = jnp.zeros((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3))
    >>> weight = LoraWeight(w, a, b, jnp.float32(1.0), layout=Layout("io"))
    >>> weight.shape, weight.rank
    ((4, 3), 2)
    """

    w: Any  # the base weight, any floating array; frozen
    a: Any  # [*batch, *in, rank]; trained
    b: Any  # [*batch, rank, *out]; trained
    scale: Any  # [*batch]; a leaf, so that a new value never recompiles; frozen
    magnitude: Any = None  # [*batch, *out], with DoRA; trained
    key: Any = None  # [*batch] typed random keys while dropout is on, else None
    # [3], of an adapter from a stack: its rank (other columns of A and rows of B are zero), its
    # rate of dropout, and 1 if it has a magnitude, else 0; frozen
    slot: Any = None
    layout: Layout = dataclasses.field(metadata={"static": True}, kw_only=True)
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True}, kw_only=True)

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.a.shape[-1]

    @property
    def slots(self) -> int | None:
        """The number of adapters that are stacked here, None if this is a single one."""
        own: tuple[int, ...] = getattr(self.a, "shape", ())
        return own[0] if len(own) == len(self.layout.positions("bi")) + 2 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, from the factors, because an overlay has no `w`."""
        batch, ins, outs = (self.layout.positions(kind) for kind in "bio")
        a_shape, b_shape = (x.shape[self.slots is not None :] for x in (self.a, self.b))
        b_shape = b_shape[: len(batch)] + b_shape[len(batch) + 1 :]
        sizes = dict(zip((*batch, *ins), a_shape[:-1], strict=True))
        sizes |= dict(zip((*batch, *outs), b_shape, strict=True))
        return tuple(sizes[i] for i in range(len(self.layout.axes)))

    def __repr__(self) -> str:
        ndims = tuple(len(self.layout.positions(kinds)) + 1 for kinds in ("bi", "bo"))
        if not has_arrays(self, "a", "b") or (len(self.a.shape), len(self.b.shape)) not in (
            ndims,
            tuple(n + 1 for n in ndims),
        ):
            return describe_fields(self)
        shown = {} if self.slots is None else {"slots": str(self.slots)}
        shown |= {"rank": str(self.rank), "layout": repr(self.layout.axes)}
        shown |= {"scale": describe_value(self.scale)}
        shown |= {} if self.magnitude is None else {"magnitude": describe_value(self.magnitude)}
        shown |= {"dropout": repr(self.dropout)} if self.dropout else {}
        return describe_node(self, shown)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedLeaf(NotAnArray):
    """Takes the place of a leaf that is fully trained: a bias, a norm, a new head.

    It means `value` unless `scale` is 0, and then the untouched base leaf `w`, so that `disable`
    gives exactly the base. In an overlay `w` is None.

    >>> import jax.numpy as jnp
    >>> TrainedLeaf(jnp.zeros(3), jnp.ones(3), jnp.float32(1.0)).shape
    (3,)
    """

    w: Any  # the base leaf; frozen
    value: Any  # same shape; trained
    scale: Any  # [], or sizes of stacked layers followed by ones; 0 switches to the base
    slot: Any = (
        None  # [], of an adapter from a stack: 1, or 0 if it does not train the leaf; frozen
    )

    @property
    def slots(self) -> int | None:
        """The number of leaves that are stacked here, None if this is a single one.

        Where leaves were stacked by hand, an overlay of stacked layers does not tell them from
        slots: there it is None.
        """
        if self.slot is not None:
            return next(iter(getattr(self.slot, "shape", ())), None)
        own: tuple[int, ...] = getattr(self.value, "shape", ())
        if self.w is None:
            like = getattr(self.scale, "shape", ()) or own
        else:
            like = getattr(self.w, "shape", own)
        return own[0] if len(own) > len(like) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return self.value.shape[self.slots is not None :]

    def __repr__(self) -> str:
        if not has_arrays(self, "value"):
            return describe_fields(self)
        return describe_node(self, {"scale": describe_value(self.scale)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedRows(NotAnArray):
    """Takes the place of a weight `W` of which some rows train, such as new tokens of an embedding.

    It means `W` with `value` in place of its rows `rows`, unless `scale` is 0, and then `W`. Row n
    is index n along `axis`: axis 0 of an embedding `[vocabulary, embed]` with layout "io", axis 1
    of a head `[embed, vocabulary]` with the same layout. In an overlay `w` is None.

    >>> import jax.numpy as jnp
    >>> w, value = jnp.zeros((3, 2)), jnp.ones((1, 2))
    >>> node = TrainedRows(w, value, jnp.float32(1.0), rows=(2,), axis=0, layout=Layout("io"))
    >>> node.replace(w, value)
    Array([[0., 0.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """

    w: Any  # the base weight; frozen
    value: Any  # [*batch, rows, *other axes of W]; trained
    scale: Any  # []; 0 switches back to the base
    slot: Any = None  # [], of an adapter from a stack: 1, or 0 if it does not train rows; frozen
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True}, kw_only=True)
    axis: int = dataclasses.field(metadata={"static": True}, kw_only=True)
    layout: Layout = dataclasses.field(metadata={"static": True}, kw_only=True)

    @property
    def slots(self) -> int | None:
        """The number of adapters that are stacked here, None if this is a single one."""
        return next(iter(getattr(self.scale, "shape", ())), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight or, in an overlay, which does not know it, of `value`."""
        own = self.value.shape[self.slots is not None :]
        return own if self.w is None else self.w.shape

    def __repr__(self) -> str:
        if not has_arrays(self, "value"):
            return describe_fields(self)
        some = ", ".join(map(str, self.rows[:4])) + ("," if len(self.rows) == 1 else "")
        more = f", ... {len(self.rows) - 4} more" if len(self.rows) > 4 else ""
        shown = {"rows": f"({some}{more})", "axis": str(self.axis)}
        shown |= {"layout": repr(self.layout.axes), "scale": describe_value(self.scale)}
        return describe_node(self, shown)

    @property
    def others(self) -> tuple[int, ...]:
        """The axes of `W` that are neither batch axes nor `axis`."""
        return tuple(i for i in self.layout.positions("io") if i != self.axis)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of `W` in the order in which `value` has them."""
        return (*self.layout.positions("b"), self.axis, *self.others)

    def value_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of `value` for a weight of this shape."""
        return tuple(len(self.rows) if i == self.axis else shape[i] for i in self.order)

    def select(self, w: Any) -> jax.Array:
        """Return the trained rows of `w`, an array or quantized, laid out as `value` is."""
        w = on_device(w)
        if is_quantized(w):
            return rows_of(w, self.rows, self.axis).transpose(self.order)
        rows = w.at[self._index].get(out_sharding=sharding_without(w, self.axis))
        return rows.transpose(self.order)

    def replace(self, w: jax.Array, value: jax.Array) -> jax.Array:
        """Return `w` with `value` in place of the trained rows, other rows the same to the bit."""
        value = value.transpose([self.order.index(i) for i in range(w.ndim)])
        return w.at[self._index].set(value, out_sharding=sharding_without(w))

    @property
    def _index(self) -> tuple[Any, ...]:
        return (*(slice(None) for _ in range(self.axis)), jnp.asarray(self.rows))


Adapted = LoraWeight | TrainedLeaf | TrainedRows


def is_adapted(node: Any) -> bool:
    """Return whether a node takes the place of an adapted leaf."""
    return isinstance(node, LoraWeight | TrainedLeaf | TrainedRows)


def is_weight(node: Any) -> bool:
    """Return whether a node counts as one leaf: adapted, or quantized."""
    return is_adapted(node) or is_quantized(node)


def check_fits(path: str, node: Adapted, w: Any, stacked: bool = False) -> list[str]:
    """Return the reasons why `node` does not fit the base leaf `w`; empty if it fits.

    A stack of adapters does not, unless `stacked` allows it.
    """
    if not hasattr(w, "shape"):
        return [f"{path}: the base holds {type(w).__name__}, not an array"]
    if not isinstance(node, TrainedLeaf) and len(node.layout.axes) != len(w.shape):
        return [f"{path}: layout {node.layout.axes!r} does not fit the base's shape {w.shape}"]
    slots = dataclasses.replace(node, w=w).slots
    if slots is not None and not stacked:
        return [
            f"{path}: a stack of {slots} adapters; take one, unstack(stack)[slot] or select(stack, "
            "slot), or give each row of a batch its own, lora(fn, adapters_of=slots)"
        ]
    lead = () if slots is None else (slots,)
    if isinstance(node, TrainedLeaf):
        same = node.value.shape == (*lead, *w.shape)
        return [] if same else [f"{path}: trained {node.value.shape}, base {w.shape}"]
    if isinstance(node, TrainedRows):
        return _check_rows_fit(path, node, w, lead)
    wanted = {
        "a": node.layout.a_shape(w.shape, node.rank),
        "b": node.layout.b_shape(w.shape, node.rank),
        "scale": node.layout.select("b", w.shape),
        "magnitude": node.layout.magnitude_shape(w.shape),
    }
    got = {name: getattr(node, name) for name in wanted}
    return [
        f"{path}: {name} is {x.shape}, the base {w.shape} needs {(*lead, *wanted[name])}"
        for name, x in got.items()
        if x is not None and x.shape != (*lead, *wanted[name])
    ]


def _check_rows_fit(path: str, node: TrainedRows, w: Any, lead: tuple[int, ...]) -> list[str]:
    size, want = w.shape[node.axis], (*lead, *node.value_shape(w.shape))
    if node.value.shape != want:
        return [f"{path}: trained rows {node.value.shape}, the base {w.shape} needs {want}"]
    beyond = [row for row in node.rows if row >= size]
    return [f"{path}: trained rows {beyond} are beyond the base's {size}"] if beyond else []


def require_base(path: str, node: Adapted) -> None:
    """Raise if `node` has no base leaf, because it comes from an overlay."""
    if node.w is None:
        raise StructureError(
            f"{path}: these are adapters without their base; call join(base, adapters) first"
        )


def require_whole(path: str, node: Adapted, stacked: bool = False) -> None:
    """Raise if `node` has no base leaf or does not fit it; a stack does if `stacked` allows it."""
    require_base(path, node)
    problems = check_fits(path, node, node.w, stacked)
    if problems:
        raise StructureError("an adapter does not fit its weight: " + "; ".join(problems))


def scaled_factors(weight: LoraWeight, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return A and `scale · B` in `dtype`."""
    _, sub_b, sub_scale, _ = subscripts(weight.layout)
    a, b, scale = (x.astype(dtype) for x in (weight.a, weight.b, weight.scale))
    return a, jnp.einsum(f"{sub_b},{sub_scale}->{sub_b}", b, scale)


def _register_for_export(node: Any) -> None:
    # jax.export can store a function of these nodes only if it can name and rebuild them.
    fields = dataclasses.fields(node)
    static = [field.name for field in fields if "static" in field.metadata]
    leaves = [field.name for field in fields if "static" not in field.metadata]

    def serialize(aux: Any) -> bytes:
        values = dict(zip(static, aux, strict=True))
        if "layout" in values:
            values["layout"] = dataclasses.astuple(values["layout"])
        if "dtype" in values:
            values["dtype"] = jnp.dtype(values["dtype"]).name
        return json.dumps(values).encode()

    def deserialize(data: bytes) -> Any:
        values = json.loads(data)
        if "layout" in values:
            axes, uses, *lookup_only = values["layout"]  # older artifacts end after `uses`
            values["layout"] = Layout(axes, tuple(uses), *lookup_only)
        if "dtype" in values:
            values["dtype"] = jnp.dtype(values["dtype"])
        if "rows" in values:  # older artifacts have no axis: the rows lay along the in axis
            values.setdefault("axis", values["layout"].axes.index("i"))
        return tuple(tuple(x) if isinstance(x := values[name], list) else x for name in static)

    from_children: Any = lambda aux, children: node(  # older artifacts lack the last fields
        **dict(zip(leaves, children, strict=False)), **dict(zip(static, aux, strict=True))
    )

    export.register_pytree_node_serialization(
        node,
        serialized_name=f"lora_jax.{node.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
        from_children=from_children,
    )


for _node in (LoraWeight, TrainedLeaf, TrainedRows, QuantizedWeight):
    _register_for_export(_node)


def restrict(node: Adapted, base: Any, mask: np.ndarray) -> Adapted:
    """Return a node of stacked layers that has no effect in the layers that `mask` leaves out.

    There A, B and the scale are zero, so all their gradients are too, whatever the scale is set to
    later. For a fully trained leaf only the scale is. `base` is the original leaf.
    """

    def one(node: Any, base: Any) -> Any:
        if isinstance(node, TrainedLeaf):
            scale = _along(mask, range(mask.ndim), node.value.ndim).astype(node.scale.dtype)
            return dataclasses.replace(node, scale=scale)
        w = node.w
        if w is not None and w is not base:  # undo what the initializer changed in those layers
            changed = _along(mask, node.layout.positions("b"), w.ndim)
            if is_quantized(base) and not is_quantized(w):
                base = base.dequantize()
            elif is_quantized(w) and not is_quantized(base):
                base = quantize_array(base, w.kind, w.axis)
            w = jax.tree.map(lambda new, old: jnp.where(changed, new, old), w, base)
        a, b, scale = (
            jnp.where(_along(mask, range(mask.ndim), x.ndim), x, jnp.zeros_like(x))
            for x in (node.a, node.b, node.scale)
        )
        return dataclasses.replace(node, w=w, a=a, b=b, scale=scale)

    made = on_shapes(one, node, base)
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(node.w))
    # It may have a sharding, which `made.w` has not.
    return dataclasses.replace(made, w=node.w) if is_abstract else made


def _along(mask: np.ndarray, positions: Sequence[int], ndim: int) -> jax.Array:
    """Return `mask` with its axes at these positions among `ndim`."""
    where = dict(zip(positions, mask.shape, strict=True))
    return jnp.asarray(mask.reshape([where.get(i, 1) for i in range(ndim)]))
