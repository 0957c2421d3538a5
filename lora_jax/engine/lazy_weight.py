"""`LazyWeight`: an adapted weight on its way through a program, never materialized."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dora import dora_gain
from lora_jax.core.dtypes import accumulator
from lora_jax.core.host_memory import on_device
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized
from lora_jax.core.sharding.meshes import is_on_mesh, on_mesh_of
from lora_jax.core.slots import slot_dropout
from lora_jax.core.weights import LoraWeight, TrainedRows
from lora_jax.engine.frozen import frozen
from lora_jax.engine.provenance import Provenance
from lora_jax.engine.quantized.view import QuantizedView, Served, wait_for


class Axis(NamedTuple):
    """The name of an axis of a view; an axis of a factor that is the same axis has the same name.

    `origins` are the parameter axes that it comes from; `uid` distinguishes axes with one origin.
    """

    origins: tuple[int, ...]
    uid: int


RANK = Axis((), -1)

#: The axis of the adapters of a stack, of which every row of a batch uses one.
SLOT = Axis((), -2_000_000)

#: The axis of the rows of a batch, each with the adapter that it picked; the base does not have it.
ROW = Axis((), -3_000_000)

#: The arrays that follow a view of the weight, and the field that names their axes.
MEMBERS = (
    ("a", "a_axes"),
    ("b", "b_axes"),
    ("key", "key_axes"),
    ("rate", "rate_axes"),
    ("gain", "gain_axes"),
    ("scale", "scale_axes"),
)


#: Marks a field of a pytree dataclass as part of its structure.
STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch whose rows use different adapters, or all of them: arrays `[rows]`."""

    slot: Any  # int32: the slot of its adapter; -1 for the plain base
    number: Any  # int32: which row it is
    # row n of all uses slot n
    in_order: bool = dataclasses.field(metadata=STATIC, default=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyWeight:
    """A view of an adapted weight: the view of the base, `w`, and factors with named axes.

    It stands for `gain · (w + Σ_rank a · b)`, with axes in the order of `axes`. Along an axis that
    neither factor has, the update is constant; a `gain` of None is 1. The scale is already in `b`,
    but where many rows have picked their adapters, or may: there it is `scale`.
    Transposing, slicing or reshaping a view renames axes and rearranges the small factors: only the
    base is as large as the weight.

    Without factors (`a` and `b` are None) it only tracks how a weight is used. Without `w` it is a
    tangent: the base is frozen, so its tangent is zero.
    """

    w: Any  # the base view, or None for a tangent
    a: Any  # axes named by a_axes, RANK among them; None while uses are inferred
    b: Any  # axes named by b_axes, RANK among them
    key: Any  # random keys for branch dropout, axes named by key_axes; None without dropout
    gain: Any = None  # DoRA's factor of the outputs, axes named by gain_axes; None without DoRA
    rate: Any = None  # of a stack's branch dropout, axes named by rate_axes; None: it is `dropout`
    scale: Any = None  # what multiplies b, axes named by scale_axes; None: it is in b
    row: Row | None = None  # what picks among the adapters that the members have along SLOT
    _: dataclasses.KW_ONLY
    axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    a_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    b_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    key_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    rate_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    gain_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    scale_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC, default=())
    shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    dtype: Any = dataclasses.field(metadata=STATIC)
    origin: Provenance = dataclasses.field(metadata=STATIC)
    dropout: float = dataclasses.field(metadata=STATIC, default=0.0)
    # where the factors only observe the inputs: which of the two in `probes` they are
    probe: str = dataclasses.field(metadata=STATIC, default="")
    # where the quantized base is requantized with the factors in it, what to
    served: Served | None = dataclasses.field(metadata=STATIC, default=None)

    @classmethod
    def of(
        cls,
        node: LoraWeight,
        path: str,
        rank_first: bool = False,
        after: Any = None,
        row: Row | None = None,
    ) -> "LazyWeight":
        """Return the lazy form of `node`; of a stack of adapters, for one row of a batch.

        With `rank_first` A is `[*batch, rank, *in]`, which is how B is laid out. The gain of a
        quantized weight is computed after the array `after`, the gain of another one: one after
        another they need the values of one weight at a time.
        """
        axes, (batch, ins, outs) = _named(node)
        node = _on_mesh_of_base(node)
        slots = () if node.slots is None else (SLOT,)
        drops = node.key is not None
        # A transposed A has to be flattened, and on a mesh it would be gathered for that.
        # The factors of all slots stay as they are until a row has picked some of them.
        whole = row is not None and bool(slots)
        rank_first = rank_first and not is_on_mesh(node.a) and not whole
        a, b = node.a, node.b
        if not whole:
            a, b = _factors(node.a, node.b, node.scale, rank_first)
        return cls(
            _frozen_base(node.w),
            a,
            b,
            node.key,
            None if node.magnitude is None else _dora_gain(_waiting(node, after)),
            slot_dropout(node.slot) if drops and node.slot is not None else None,
            lax.stop_gradient(node.scale) if whole else None,
            row if whole else None,
            axes=axes,
            a_axes=(*slots, *batch, RANK, *ins) if rank_first else (*slots, *batch, *ins, RANK),
            b_axes=(*slots, *batch, RANK, *outs),
            key_axes=(*slots, *batch) if drops else (),
            rate_axes=slots if drops and node.slot is not None else (),
            gain_axes=() if node.magnitude is None else (*slots, *batch, *outs),
            scale_axes=(*slots, *batch) if whole else (),
            shape=node.w.shape,
            dtype=node.w.dtype,
            origin=Provenance.of(path, node.w.ndim),
            dropout=node.dropout if drops else 0.0,
        )

    @classmethod
    def of_rows(cls, node: TrainedRows, path: str) -> "LazyWeight":
        """Return the lazy form of `node`: `W + onehot(rows) · (value − W[rows])`, of rank k.

        The one-hot A `[*batch, k, rows of W]` is a constant, so every rule for factors serves
        trained rows too.
        """
        node = _on_mesh_of_base(node)
        axes, (batch, _, _) = _named(node)
        w = _frozen_base(node.w)
        dtype = accumulator(node.value.dtype, w.dtype)
        base = w.weight if isinstance(w, QuantizedView) else w
        update = node.value.astype(dtype) - node.select(base).astype(dtype)
        one_hot = jax.nn.one_hot(jnp.asarray(node.rows), w.shape[node.axis], dtype=dtype)
        return cls(
            w,
            jnp.broadcast_to(one_hot, (*node.layout.select("b", w.shape), *one_hot.shape)),
            jnp.where(lax.stop_gradient(node.scale) != 0, update, jnp.zeros_like(update)),
            None,
            axes=axes,
            a_axes=(*batch, RANK, axes[node.axis]),
            b_axes=(*batch, RANK, *(axes[i] for i in node.others)),
            shape=w.shape,
            dtype=w.dtype,
            origin=Provenance.of(path, w.ndim),
        )

    @classmethod
    def tracked(cls, w: Any, path: str) -> "LazyWeight":
        """Return a weight without factors, to see how a program uses `w`."""
        axes = tuple(Axis((i,), i) for i in range(w.ndim))
        origin = Provenance.of(path, w.ndim)
        return cls(w, None, None, None, axes=axes, shape=w.shape, dtype=w.dtype, origin=origin)

    @classmethod
    def of_quantized(cls, w: QuantizedWeight, path: str) -> "LazyWeight":
        """Return a quantized weight without adapters."""
        return cls.tracked(QuantizedView.of(w), path)

    @property
    def sizes(self) -> dict[Hashable, int]:
        """The size of every axis of the view."""
        return dict(zip(self.axes, self.shape, strict=True))

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.a.shape[self.a_axes.index(RANK)]

    @property
    def differs_by_row(self) -> bool:
        """Whether it is another weight for each row of a batch, although its base is one."""
        many = self.row is not None and self.row.slot.ndim > 0
        return (many or ROW in (*self.a_axes, *self.b_axes)) and ROW not in self.axes

    @property
    def is_whole(self) -> bool:
        """Whether the view has all axes of one parameter, or of one layer of a stack, and no other.

        It has two of them or more.
        """
        origins = sorted(axis.origins for axis in self.axes)
        own = [(i,) for i in range(self.origin.ndim) if i not in self.origin.indexed]
        return len(own) > 1 and not self.origin.looked_up and origins == own

    def axes_of(self, member: str) -> tuple[Axis, ...]:
        """Return the names of the axes of a member, "a", "b", "key" or "gain"."""
        return getattr(self, f"{member}_axes")

    def holders(self, axis: Axis) -> tuple[str, ...]:
        """Return the members that have `axis`."""
        return tuple(name for name, axes in MEMBERS if axis in getattr(self, axes))

    def new_axis(self, origins: Sequence[int] = (), skip: int = 0) -> Axis:
        """Return a name that no axis here has; a different one for each `skip`."""
        named = (*self.axes, *(axis for _, axes in MEMBERS for axis in getattr(self, axes)))
        return Axis(
            tuple(sorted(set(origins))), 1 + skip + max(axis.uid for axis in (*named, RANK))
        )

    def rename_axes(self, axes: Sequence[Axis]) -> "LazyWeight":
        """Return the weight with other names for the axes of the view."""
        names = dict(zip(self.axes, axes, strict=True))
        changes: dict[str, Any] = {}
        for _, field in MEMBERS:
            changes[field] = tuple(names.get(axis, axis) for axis in getattr(self, field))
        return dataclasses.replace(self, axes=tuple(axes), **changes)

    def map_members(
        self, fn: Callable[[jax.Array, tuple[Axis, ...]], tuple[jax.Array, Sequence[Axis]]]
    ) -> "LazyWeight":
        """Apply `fn(array, axes) -> (array, axes)` to each member that is not None."""
        changes: dict[str, Any] = {}
        for name, axes in MEMBERS:
            if getattr(self, name) is not None:
                array, new_axes = fn(getattr(self, name), getattr(self, axes))
                changes |= {name: array, axes: tuple(new_axes)}
        return dataclasses.replace(self, **changes)

    def map_axis(
        self, old: Axis, fn: Callable[[jax.Array, int], jax.Array], new: Axis | None
    ) -> "LazyWeight":
        """Apply `fn(array, dimension)` to members that have `old`, which becomes `new` or goes."""

        def one(array: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
            if old not in axes:
                return array, axes
            at = axes.index(old)
            return fn(array, at), axes[:at] + ((new,) if new else ()) + axes[at + 1 :]

        return self.map_members(one)


def _named(node: LoraWeight | TrainedRows) -> tuple[tuple[Axis, ...], list[tuple[Axis, ...]]]:
    """Return names for the axes of a weight, and those of its batch, in and out axes."""
    axes = tuple(Axis((i,), i) for i in range(node.w.ndim))
    return axes, [tuple(axes[i] for i in node.layout.positions(kind)) for kind in "bio"]


def _waiting(node: LoraWeight, after: Any) -> LoraWeight:
    if after is None or not is_quantized(node.w):
        return node
    w = jax.tree.map(on_device, node.w)
    return dataclasses.replace(node, w=wait_for(w, after))


def _frozen_base(w: Any) -> Any:
    """Return the base: no dW is formed, whatever the caller differentiates."""
    return QuantizedView.of(w) if is_quantized(w) else frozen(w)


def _on_mesh_of_base(node: Any) -> Any:
    """Return an adapted weight with everything in it on the explicit mesh of its base, if any."""
    like = jax.tree.leaves(node.w)[0]  # of a quantized base, its codes
    return jax.tree.map(lambda x: on_mesh_of(x, like), node)


@functools.partial(jax.jit, static_argnames="rank_first")
def _factors(
    a: jax.Array, b: jax.Array, scale: jax.Array, rank_first: bool
) -> tuple[jax.Array, jax.Array]:
    """Return A and `scale · B`. Jitted, so that weights of the same shapes are traced once."""
    # XLA does not move the scale to the small side: (x·A)·(scale·B) is 23 % fewer bytes per layer.
    dtype, n_batch = accumulator(a.dtype, b.dtype), scale.ndim
    scale = lax.stop_gradient(scale).astype(dtype)
    if n_batch:
        scale = lax.broadcast_in_dim(scale, b.shape, range(n_batch))
    if rank_first:
        # Without the barrier XLA folds the transpose into the products and into their gradients.
        # The barrier is on a flat array: otherwise jaxlib 0.10 propagates its layout to batched
        # products and aborts. It is one barrier per weight: inside a shard_map several weights may
        # vary over different axes.
        order = (*range(n_batch), a.ndim - 1, *range(n_batch, a.ndim - 1))
        a = lax.transpose(a, order)
        a = lax.optimization_barrier(a.reshape(-1)).reshape(a.shape)
    return a, lax.mul(b.astype(dtype), scale)


_dora_gain = jax.jit(dora_gain)  # weights of the same shapes are traced once


def tangents(primal: LazyWeight, da: Any, db: Any) -> tuple[LazyWeight, LazyWeight]:
    """Return the two terms of a weight's tangent, `da·b` and `a·db`, neither with a base.

    They are two, not one of twice the rank, so that each is linear in `da` or `db`.
    """
    replace = dataclasses.replace
    return replace(primal, w=None, a=da), replace(primal, w=None, b=db)


def is_lazy(x: Any) -> bool:
    """Return whether a value is a lazy weight."""
    return isinstance(x, LazyWeight)
