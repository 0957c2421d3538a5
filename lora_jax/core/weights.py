"""The nouns: `Layout`, `LoraWeight` and `TrainedLeaf`."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lora_jax.core.errors import LayoutError, StructureError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are batch, in and out: one letter an axis, `b`, `i` or `o`.

    A Dense kernel `[in, out]` is "io", an attention kernel `[embed, heads, head_dim]` "ioo", a
    stack of Dense kernels `[layers, in, out]` "bio", a convolution `[height, width, in, out]`
    "iiio".

    Args:
      axes: the letters, one for every axis of the weight.
      uses: the primitives that use the weight ("dot_general", "gather", ...), for `summary`; two
        layouts that differ in this alone are equal.

    Raises:
      LayoutError: another letter, or no in or no out axis.

    >>> layout = Layout("bio")
    >>> layout.a_shape((12, 768, 3072), rank=8), layout.b_shape((12, 768, 3072), rank=8)
    ((12, 768, 8), (12, 8, 3072))
    """

    axes: str
    uses: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not set(self.axes) <= set("bio") or "i" not in self.axes or "o" not in self.axes:
            raise LayoutError(
                f"layout {self.axes!r} must have one letter an axis, b(atch), i(n) or o(ut), "
                "with at least one i and one o"
            )

    def positions(self, kinds: str) -> tuple[int, ...]:
        """The axes whose letter is in `kinds`: `Layout("bio").positions("bo")` is (0, 2)."""
        return tuple(i for i, kind in enumerate(self.axes) if kind in kinds)

    def select(self, kinds: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes in `shape` of the axes whose letter is in `kinds`."""
        return tuple(shape[i] for i in self.positions(kinds))

    def a_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """`[*batch, *in, rank]` for a weight of this shape."""
        return (*self.select("b", shape), *self.select("i", shape), rank)

    def b_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """`[*batch, rank, *out]` for a weight of this shape."""
        return (*self.select("b", shape), rank, *self.select("o", shape))

    def magnitude_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[*batch, *out]` for a weight of this shape: a number for every output."""
        return (*self.select("b", shape), *self.select("o", shape))

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """Product of the in axes: how many inputs meet in one output."""
        return math.prod(self.select("i", shape))

    def fan_out(self, shape: tuple[int, ...]) -> int:
        """Product of the out axes."""
        return math.prod(self.select("o", shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """Stands in a parameter tree where a kernel `W` stood, and means `W + scale · A · B`.

    LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685. With a
    `magnitude` it means `magnitude · V / ‖V‖`, V being that sum and the norm taken over the in axes
    of each output: DoRA, https://arxiv.org/abs/2402.09353. A pytree node: `w`, `a`, `b`, `scale`,
    `magnitude` and `key` are leaves, the rest is static. In an *overlay* (the adapters that `split`
    returns) `w` is None.

    >>> import jax.numpy as jnp
    >>> w, a, b = jnp.zeros((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3))
    >>> weight = LoraWeight(w, a, b, jnp.float32(1.0), layout=Layout("io"))
    >>> weight.shape, weight.rank
    ((4, 3), 2)
    """

    w: Any  # the base weight, any floating array; frozen
    a: Any  # [*batch, *in, rank]; trained
    b: Any  # [*batch, rank, *out]; trained
    scale: Any  # [*batch]; a leaf, so that changing it never recompiles; frozen
    magnitude: Any = None  # [*batch, *out], with DoRA; trained
    key: Any = None  # [*batch] typed random keys while branch dropout is on, else None
    layout: Layout = dataclasses.field(metadata={"static": True}, kw_only=True)
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True}, kw_only=True)

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, from the factors (an overlay has no `w`)."""
        batch, ins, outs = (self.layout.positions(kind) for kind in "bio")
        b_shape = self.b.shape[: len(batch)] + self.b.shape[len(batch) + 1 :]
        sizes = dict(zip((*batch, *ins), self.a.shape[:-1], strict=True))
        sizes |= dict(zip((*batch, *outs), b_shape, strict=True))
        return tuple(sizes[i] for i in range(len(self.layout.axes)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedLeaf:
    """Stands where a leaf stood that is trained whole (a bias, a norm, a new head).

    It means `value` while `scale` is not 0, else the untouched base leaf `w`, so that `disable`
    gives back exactly the base. In an overlay `w` is None.

    >>> import jax.numpy as jnp
    >>> TrainedLeaf(jnp.zeros(3), jnp.ones(3), jnp.float32(1.0)).shape
    (3,)
    """

    w: Any  # the base leaf; frozen
    value: Any  # same shape; trained
    scale: Any  # [], or the sizes of stacked layers with ones behind; 0 switches to the base

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return self.value.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedRows:
    """Stands where an embedding `W` stood of which some rows train: new tokens, say.

    It means `W` with `value` in place of its rows `rows` while `scale` is not 0, else `W`. The rows
    lie along the layout's in axis, the axis that is looked up. In an overlay `w` is None.

    >>> import jax.numpy as jnp
    >>> w, value = jnp.zeros((3, 2)), jnp.ones((1, 2))
    >>> node = TrainedRows(w, value, jnp.float32(1.0), rows=(2,), layout=Layout("io"))
    >>> node.replace(w, value)
    Array([[0., 0.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """

    w: Any  # the base weight; frozen
    value: Any  # [*batch, rows, *out]; trained
    scale: Any  # []; 0 switches back to the base
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True}, kw_only=True)
    layout: Layout = dataclasses.field(metadata={"static": True}, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight; in an overlay, which does not know it, that of its rows."""
        return self.value.shape if self.w is None else self.w.shape

    def select(self, w: jax.Array) -> jax.Array:
        """The trained rows of `w`, laid out as `value` is."""
        (axis,), layout = self.layout.positions("i"), self.layout
        picked = jnp.take(w, jnp.asarray(self.rows), axis)
        return picked.transpose(*layout.positions("b"), axis, *layout.positions("o"))

    def replace(self, w: jax.Array, value: jax.Array) -> jax.Array:
        """`w` with `value` in place of the trained rows, every other row the same to the bit."""
        (axis,), layout = self.layout.positions("i"), self.layout
        order = [*layout.positions("b"), axis, *layout.positions("o")]
        value = value.transpose([order.index(i) for i in range(w.ndim)])
        return w.at[(slice(None),) * axis + (jnp.asarray(self.rows),)].set(value)


Adapted = LoraWeight | TrainedLeaf | TrainedRows


def is_adapted(node: Any) -> bool:
    """Whether a node is one of those that stand for an adapted leaf."""
    return isinstance(node, LoraWeight | TrainedLeaf | TrainedRows)


def check_fits(path: str, node: Adapted, w: Any) -> list[str]:
    """What keeps `node`'s factors from standing on the base leaf `w`; empty where they fit."""
    if not hasattr(w, "shape"):
        return [f"{path}: the base holds {type(w).__name__}, not an array"]
    if isinstance(node, TrainedLeaf):
        same = node.value.shape == w.shape
        return [] if same else [f"{path}: trained {node.value.shape}, base {w.shape}"]
    if len(node.layout.axes) != len(w.shape):
        return [f"{path}: layout {node.layout.axes!r} does not fit the base's shape {w.shape}"]
    if isinstance(node, TrainedRows):
        return _check_rows_fit(path, node, w)
    wanted = {
        "a": node.layout.a_shape(w.shape, node.rank),
        "b": node.layout.b_shape(w.shape, node.rank),
        "scale": node.layout.select("b", w.shape),
        "magnitude": node.layout.magnitude_shape(w.shape),
    }
    got = {name: getattr(node, name) for name in wanted}
    return [
        f"{path}: {name} is {x.shape}, the base {w.shape} needs {wanted[name]}"
        for name, x in got.items()
        if x is not None and x.shape != wanted[name]
    ]


def _check_rows_fit(path: str, node: TrainedRows, w: Any) -> list[str]:
    size = node.layout.select("i", w.shape)[0]
    want = node.layout.b_shape(w.shape, len(node.rows))
    if node.value.shape != want:
        return [f"{path}: trained rows {node.value.shape}, the base {w.shape} needs {want}"]
    beyond = [row for row in node.rows if row >= size]
    return [f"{path}: trained rows {beyond} are beyond the base's {size}"] if beyond else []


def require_base(path: str, node: Adapted) -> None:
    """Raise where `node` comes from an overlay and has no base leaf."""
    if node.w is None:
        raise StructureError(
            f"{path}: these are adapters without their base; join(base, adapters) them first"
        )


def require_whole(path: str, node: Adapted) -> None:
    """Raise where `node` has no base leaf, or its factors do not fit it."""
    require_base(path, node)
    problems = check_fits(path, node, node.w)
    if problems:
        raise StructureError("an adapter does not fit its weight: " + "; ".join(problems))


def _register_for_export(node: Any) -> None:
    # jax.export can store a function of these nodes only when it can name and rebuild them.
    fields = dataclasses.fields(node)
    static = [field.name for field in fields if "static" in field.metadata]
    leaves = [field.name for field in fields if "static" not in field.metadata]

    def serialize(aux: Any) -> bytes:
        values = dict(zip(static, aux, strict=True))
        if "layout" in values:
            values["layout"] = [values["layout"].axes, values["layout"].uses]
        return json.dumps(values).encode()

    def deserialize(data: bytes) -> Any:
        values = json.loads(data)
        if "layout" in values:
            values["layout"] = Layout(values["layout"][0], tuple(values["layout"][1]))
        return tuple(tuple(x) if isinstance(x, list) else x for x in values.values())

    from_children: Any = lambda aux, children: node(
        **dict(zip(leaves + static, (*children, *aux), strict=True))
    )

    export.register_pytree_node_serialization(
        node,
        serialized_name=f"lora_jax.{node.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
        from_children=from_children,
    )


for _node in (LoraWeight, TrainedLeaf, TrainedRows):
    _register_for_export(_node)
