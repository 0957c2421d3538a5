"""Rules for views of a weight: names and small factors move, the base goes through the equation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _contract, _jaxpr
from lora_jax.context import Context
from lora_jax.lazy import Axis, LazyWeight, is_lazy
from lora_jax.rules import Rule, rule

RULES: dict[str, Rule] = {}


def on_base(eqn: Any, lazy: LazyWeight, *others: Any) -> Any:
    """The equation's output on the base view alone; None for a tangent, whose base is zero."""
    return None if lazy.w is None else _jaxpr.bind(eqn, [lazy.w, *others])[0]


def viewed(eqn: Any, lazy: LazyWeight, axes: Sequence[Axis], *others: Any) -> list[LazyWeight]:
    """The outputs of a view: members as in `lazy`, the base through the equation itself."""
    aval = eqn.outvars[0].aval
    return [
        dataclasses.replace(
            lazy,
            w=on_base(eqn, lazy, *others),
            axes=tuple(axes),
            shape=aval.shape,
            dtype=aval.dtype,
        )
    ]


_SAME_AXES = ("copy", "copy_p", "name", "sharding_constraint", "convert_element_type")


@rule(RULES, *_SAME_AXES, "pvary", "pcast")
def _same_axes(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """The factors keep their own dtype; they are cast where they are multiplied."""
    lazy = args[0]
    if len(args) > 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return NotImplemented
    return viewed(eqn, lazy, lazy.axes)


@rule(RULES, "stop_gradient")
def _stop_gradient(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    stopped = lazy.map_members(lambda array, axes: (lax.stop_gradient(array), axes))
    return viewed(eqn, stopped, lazy.axes)


@rule(RULES, "neg")
def _neg(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    return viewed(eqn, _scaled(lazy, lambda b: -b), lazy.axes)


@rule(RULES, "mul", "div")
def _scalar_multiple(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """weight · scalar and weight / scalar: B takes the scalar."""
    left, right = args
    if is_lazy(left) and is_lazy(right):
        return NotImplemented
    lazy, scalar = (left, right) if is_lazy(left) else (right, left)
    divides = eqn.primitive.name == "div"
    if jnp.ndim(scalar) != 0 or (divides and is_lazy(right)):
        return NotImplemented
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return NotImplemented
    operation = lax.div if divides else lax.mul
    scaled = _scaled(lazy, lambda b: operation(b, lax.convert_element_type(scalar, b.dtype)))
    operands = [x.w if is_lazy(x) else x for x in args]
    w = None if lazy.w is None else _jaxpr.bind(eqn, operands)[0]
    return [dataclasses.replace(scaled, w=w)]


def _scaled(lazy: LazyWeight, fn: Callable[[jax.Array], jax.Array]) -> LazyWeight:
    return lazy if lazy.b is None else dataclasses.replace(lazy, b=fn(lazy.b))


@rule(RULES, "transpose")
def _transpose(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    return viewed(eqn, lazy, [lazy.axes[i] for i in eqn.params["permutation"]])


@rule(RULES, "squeeze")
def _squeeze(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    gone = [lazy.axes[i] for i in eqn.params["dimensions"]]
    return viewed(eqn, _without(lazy, gone), [axis for axis in lazy.axes if axis not in gone])


def _without(lazy: LazyWeight, axes: Sequence[Axis]) -> LazyWeight:
    """The members without these axes, all of size one."""
    for axis in axes:
        lazy = lazy.map_axis(axis, lambda x, at: lax.squeeze(x, [at]), None)
    return lazy


@rule(RULES, "broadcast_in_dim")
def _broadcast_in_dim(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    lazy, *dynamic = args
    if dynamic:
        return NotImplemented
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    grown = [a for a, d in zip(lazy.axes, dims, strict=True) if lazy.sizes[a] != shape[d]]
    source = {d: a for a, d in zip(lazy.axes, dims, strict=True) if a not in grown}
    new = [lazy.new_axis(skip=d) for d in range(len(shape))]
    axes = [source.get(d, new[d]) for d in range(len(shape))]
    return viewed(eqn, _without(lazy, grown), axes)


@rule(RULES, "reshape")
def _reshape(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Each group of axes that the reshape splits or joins must belong to the same factors."""
    lazy, *dynamic = args
    order = eqn.params["dimensions"] or range(len(lazy.axes))  # an order to read the axes in
    old, new = [lazy.shape[i] for i in order], eqn.outvars[0].aval.shape
    source = [lazy.axes[i] for i in order]
    if dynamic or 0 in old:
        return NotImplemented
    groups = _contract.reshape_groups(old, new)
    ones = [axis for axis, size in zip(source, old, strict=True) if size == 1]
    axes = [lazy.new_axis(skip=j) for j in range(len(new))]
    moved = _without(lazy, ones)
    for olds, news in groups:
        names = [source[i] for i in olds]
        if len({lazy.holders(name) for name in names}) > 1:
            return NotImplemented
        if len(olds) == len(news) == 1:
            axes[news[0]] = names[0]
            continue
        origins = [origin for name in names for origin in name.origins]
        for j in news:
            axes[j] = Axis(tuple(sorted(set(origins))), axes[j].uid)
        moved = _regroup(moved, names, [axes[j] for j in news], [new[j] for j in news])
    return viewed(eqn, moved, axes)


def _regroup(
    lazy: LazyWeight, names: Sequence[Axis], new: Sequence[Axis], sizes: Sequence[int]
) -> LazyWeight:
    """Reshape, in the members that hold them, the axes `names` into the axes `new`."""

    def one(array: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        if names[0] not in axes:
            return array, axes
        rest = [axis for axis in axes if axis not in names]
        order = [axes.index(axis) for axis in (*names, *rest)]
        array = array.transpose(order)
        return array.reshape(*sizes, *array.shape[len(names) :]), [*new, *rest]

    return lazy.map_members(one)


@rule(RULES, "rev")
def _rev(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    moved = lazy
    for i in eqn.params["dimensions"]:
        axis = lazy.axes[i]
        moved = moved.map_axis(axis, lambda x, at: lax.rev(x, [at]), axis)
    return viewed(eqn, moved, lazy.axes)


@rule(RULES, "slice")
def _slice(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    params, moved, axes = eqn.params, lazy, list(lazy.axes)
    strides = params["strides"] or (1,) * len(axes)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for i, (start, limit, stride) in enumerate(bounds):
        old = axes[i]
        if (start, limit, stride) != (0, lazy.shape[i], 1):
            axes[i] = moved.new_axis(old.origins, skip=i)
            moved = moved.map_axis(
                old,
                lambda x, at, s=start, e=limit, k=stride: lax.slice_in_dim(x, s, e, k, at),
                axes[i],
            )
            if limit - start == 1:
                moved = mark_indexed(moved, old)
    return viewed(eqn, moved, axes)


@rule(RULES, "reduce_sum")
def _reduce_sum(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """A factor keeps a summed axis; the name is gone from the view, so the next product sums it."""
    (lazy,) = args
    gone = [lazy.axes[i] for i in eqn.params["axes"]]
    if lazy.a is not None and not all({"a", "b"} & set(lazy.holders(axis)) for axis in gone):
        return NotImplemented
    return viewed(eqn, lazy, [axis for axis in lazy.axes if axis not in gone])


@rule(RULES, "split")
def _split(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    at, start, outs = eqn.params["axis"], 0, []
    bases = [None] * len(eqn.outvars) if lazy.w is None else _jaxpr.bind(eqn, [lazy.w])
    for base, size in zip(bases, eqn.params["sizes"], strict=True):
        new = lazy.new_axis(lazy.axes[at].origins)
        part = lazy.map_axis(
            lazy.axes[at],
            lambda x, dim, s=start, n=size: lax.slice_in_dim(x, s, s + n, axis=dim),
            new,
        )
        axes = (*lazy.axes[:at], new, *lazy.axes[at + 1 :])
        shape = (*lazy.shape[:at], size, *lazy.shape[at + 1 :])
        outs.append(dataclasses.replace(part, w=base, axes=axes, shape=shape))
        start += size
    return outs


@rule(RULES, "unstack")
def _unstack(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    at = eqn.params["axis"]
    old, rest = lazy.axes[at], (*lazy.axes[:at], *lazy.axes[at + 1 :])
    bases = [None] * len(eqn.outvars) if lazy.w is None else _jaxpr.bind(eqn, [lazy.w])
    shape = (*lazy.shape[:at], *lazy.shape[at + 1 :])
    return [
        dataclasses.replace(
            mark_indexed(
                lazy.map_axis(
                    old, lambda x, dim, n=n: lax.index_in_dim(x, n, dim, keepdims=False), None
                ),
                old,
            ),
            w=base,
            axes=rest,
            shape=shape,
        )
        for n, base in enumerate(bases)
    ]


def mark_indexed(lazy: LazyWeight, axis: Axis) -> LazyWeight:
    """The view, with the axes of the parameter that `axis` comes from noted as indexed away."""
    return dataclasses.replace(lazy, indexed=tuple(sorted({*lazy.indexed, *axis.origins})))
