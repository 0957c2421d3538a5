"""Rules for views: names and small factors are rearranged, the base passes the equation itself."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import wider
from lora_jax.engine import jaxprs, named_axes
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, Axis, LazyWeight, is_lazy
from lora_jax.engine.quantized import moves
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.registry import PrimitiveRule, rule

RULES: dict[str, PrimitiveRule] = {}


def on_base(eqn: Any, lazy: LazyWeight, *others: Any) -> Any:
    """Return the equation's output on the base view; None for a tangent, whose base is zero."""
    return bind_base(eqn, [lazy.w, *others])[0]


def bind_base(eqn: Any, values: Sequence[Any], which: Any = None) -> Sequence[Any]:
    """Return the equation's outputs on base views and arrays; None for those of a tangent.

    `which` is as in `moves.apply`.
    """
    if any(x is None for x in values):
        return [None] * len(eqn.outvars)
    if any(isinstance(x, QuantizedView) for x in values):
        return moves.apply(eqn, values, which)
    return jaxprs.bind(eqn, values)


def view_of(eqn: Any, lazy: LazyWeight, axes: Sequence[Axis], *others: Any) -> list[LazyWeight]:
    """Return the outputs of a view: the members of `lazy`, and the base from the equation."""
    return [view_with(eqn, lazy, axes, on_base(eqn, lazy, *others))]


def view_with(eqn: Any, lazy: LazyWeight, axes: Sequence[Axis], w: Any) -> LazyWeight:
    """Return the output of a view whose base is `w`."""
    aval = eqn.outvars[0].aval
    return dataclasses.replace(lazy, w=w, axes=tuple(axes), shape=aval.shape, dtype=aval.dtype)


_SAME_AXES = ("copy", "copy_p", "name", "sharding_constraint", "convert_element_type")


@rule(RULES, *_SAME_AXES)
def _same_axes(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Keep the factors in their own dtype; they are cast where they are multiplied."""
    lazy = args[0]
    if len(args) > 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return NotImplemented
    return view_of(eqn, lazy, lazy.axes)


@rule(RULES, "device_put")
def _device_put(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Move the bases between memories or devices; the factors are where they take part."""
    values = [x.w if is_lazy(x) else x for x in args]
    if any(w is None for w in values):
        return args  # a tangent has no base
    moved = moves.put(eqn, values)
    pairs = zip(args, moved, strict=True)
    return [dataclasses.replace(x, w=w) if is_lazy(x) else w for x, w in pairs]


@rule(RULES, "stop_gradient")
def _stop_gradient(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    stopped = lazy.map_members(lambda array, axes: (lax.stop_gradient(array), axes))
    return view_of(eqn, stopped, lazy.axes)


@rule(RULES, "neg")
def _neg(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    return view_of(eqn, _scale_update(lazy, lambda b: -b), lazy.axes)


@rule(RULES, "mul", "div")
def _multiple(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Multiply by s, or divide: the factor that has all axes along which s varies takes it."""
    aval, divides = eqn.outvars[0].aval, eqn.primitive.name == "div"
    weights = [i for i, x in enumerate(args) if is_lazy(x) and x.shape == aval.shape]
    if len(weights) != 1 or (divides and weights == [1]):
        return NotImplemented
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return NotImplemented
    lazy, s = args[weights[0]], args[1 - weights[0]]
    shape = eqn.invars[1 - weights[0]].aval.shape  # () or of as many axes as the weight
    varying = [axis for axis, n in zip(lazy.axes, shape, strict=False) if n != 1]
    factor = _factor_with(lazy, varying)
    if factor is None:
        return NotImplemented
    s = ctx.densify(s, eqn) if is_lazy(s) else s
    operation = jnp.divide if divides else jnp.multiply
    (w,) = bind_base(eqn, [(lazy.w, s), (s, lazy.w)][weights[0]])
    scaled = lazy if lazy.a is None else _scale_along(lazy, factor, operation, s, varying)
    return [dataclasses.replace(scaled, w=w)]


def _factor_with(lazy: LazyWeight, axes: Sequence[Axis]) -> str | None:
    """Return a factor with all these axes, B before A; while uses are inferred, assume one."""
    if lazy.a is None:
        some = any(axis not in axes for axis, size in lazy.sizes.items() if size != 1)
        return "b" if some or not axes else None
    return next((f for f in ("b", "a") if set(axes) <= set(lazy.axes_of(f))), None)


def _scale_along(
    lazy: LazyWeight, factor: str, operation: Callable, s: jax.Array, varying: Sequence[Axis]
) -> LazyWeight:
    """Return the weight with `operation(factor, s)`, s varying along some axes of the factor."""
    array, axes = getattr(lazy, factor), lazy.axes_of(factor)
    # s: [*varying], in the weight's order, then in the factor's, then with ones for other axes
    s = jnp.asarray(s).reshape([lazy.sizes[axis] for axis in varying])
    s = s.transpose([varying.index(axis) for axis in axes if axis in varying])
    s = s.reshape([n if axis in varying else 1 for axis, n in zip(axes, array.shape, strict=True)])
    wide = wider(array.dtype, s.dtype)
    return dataclasses.replace(lazy, **{factor: operation(array.astype(wide), s.astype(wide))})


def _scale_update(lazy: LazyWeight, fn: Callable[[jax.Array], jax.Array]) -> LazyWeight:
    return lazy if lazy.b is None else dataclasses.replace(lazy, b=fn(lazy.b))


@rule(RULES, "transpose")
def _transpose(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    return view_of(eqn, lazy, [lazy.axes[i] for i in eqn.params["permutation"]])


@rule(RULES, "squeeze")
def _squeeze(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    gone = [lazy.axes[i] for i in eqn.params["dimensions"]]
    return view_of(eqn, _drop_axes(lazy, gone), [axis for axis in lazy.axes if axis not in gone])


def _drop_axes(lazy: LazyWeight, axes: Sequence[Axis]) -> LazyWeight:
    """Return the weight without these axes, all of size one, in its members."""
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
    return view_of(eqn, _drop_axes(lazy, grown), axes)


@rule(RULES, "reshape")
def _reshape(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Reshape the members group by group; a group is a run of axes that are split or joined.

    `[embed, heads·dim] -> [embed, heads, dim]` has the groups (0) -> (0) and (1) -> (1, 2). All
    axes of a group must belong to the same factors.
    """
    lazy, *dynamic = args
    order = eqn.params["dimensions"] or range(len(lazy.axes))  # an order to read the axes in
    old, new = [lazy.shape[i] for i in order], eqn.outvars[0].aval.shape
    source = [lazy.axes[i] for i in order]
    if dynamic or 0 in old:
        return NotImplemented
    groups = named_axes.reshape_groups(old, new)
    # axes of size one are in no group: the old ones are squeezed, the new ones get fresh names
    ones = [axis for axis, size in zip(source, old, strict=True) if size == 1]
    axes = [lazy.new_axis(skip=j) for j in range(len(new))]
    moved = _drop_axes(lazy, ones)
    for olds, news in groups:
        names = [source[i] for i in olds]
        holders = {lazy.holders(name) for name in names} - {()}
        if len(holders) > 1:
            return NotImplemented
        if len(olds) == len(news) == 1:  # an axis that keeps its size keeps its name
            axes[news[0]] = names[0]
            continue
        # an axis that no factor has is repeated in those of the group, so that it can be joined
        for name in names if holders else ():
            moved = spread(moved, name, set(next(iter(holders))))
        # [*olds] -> [*news], whose origins are those of the whole group
        origins = [origin for name in names for origin in name.origins]
        for j in news:
            axes[j] = Axis(tuple(sorted(set(origins))), axes[j].uid)
        moved = _regroup(moved, names, [axes[j] for j in news], [new[j] for j in news])
    return view_of(eqn, moved, axes)


def _regroup(
    lazy: LazyWeight, names: Sequence[Axis], new: Sequence[Axis], sizes: Sequence[int]
) -> LazyWeight:
    """Reshape the axes `names` to the axes `new`, in the members that have them."""

    def one(array: jax.Array, axes: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        if names[0] not in axes:
            return array, axes
        # [*names, *rest] -> [*new, *rest]
        rest = [axis for axis in axes if axis not in names]
        order = [axes.index(axis) for axis in (*names, *rest)]
        array = array.transpose(order)
        return array.reshape(*sizes, *array.shape[len(names) :]), [*new, *rest]

    return lazy.map_members(one)


def spread(lazy: LazyWeight, axis: Axis, members: Collection[str]) -> LazyWeight:
    """Repeat these members along an axis that they lack: `jnp.repeat` makes one, then joins it."""
    changes: dict[str, Any] = {}
    for name, field in MEMBERS:
        axes, array = getattr(lazy, field), getattr(lazy, name)
        if name in members and array is not None and axis not in axes:
            array = jnp.broadcast_to(jnp.expand_dims(array, 0), (lazy.sizes[axis], *array.shape))
            changes |= {name: array, field: (axis, *axes)}
    return dataclasses.replace(lazy, **changes)


@rule(RULES, "tile")
def _tile(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    moved, axes = lazy, list(lazy.axes)
    for i, n in enumerate(eqn.params["reps"]):
        if n != 1:
            axes[i] = moved.new_axis(axes[i].origins, skip=i)
            repeat = lambda x, at, n=n: jnp.concatenate([x] * n, at)
            moved = moved.map_axis(lazy.axes[i], repeat, axes[i])
    return view_of(eqn, moved, axes)


@rule(RULES, "pad")
def _pad(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Pad the base with the value and a factor with zeros, so that the update is zero there."""
    lazy, value = args
    if not is_lazy(lazy) or is_lazy(value):
        return NotImplemented
    is_zero = not jaxprs.is_var(eqn.invars[1]) and value == 0
    if not is_zero and (lazy.w is None or lazy.gain is not None):
        return (
            NotImplemented  # a tangent has no base to pad, and the gain must not multiply the value
        )
    moved, axes = lazy, list(lazy.axes)
    for i, config in enumerate(eqn.params["padding_config"]):
        if config != (0, 0, 0):
            holders = lazy.holders(axes[i])
            if lazy.a is not None and ("key" in holders or not {"a", "b"} & {*holders}):
                return NotImplemented
            axes[i] = moved.new_axis(axes[i].origins, skip=i)
            moved = moved.map_axis(lazy.axes[i], _padder(config), axes[i])
    return view_of(eqn, moved, axes, value)


def _padder(config: tuple[int, int, int]) -> Callable[[jax.Array, int], jax.Array]:
    def pad(x: jax.Array, at: int) -> jax.Array:
        configs = [config if i == at else (0, 0, 0) for i in range(x.ndim)]
        return lax.pad(x, jnp.zeros((), x.dtype), configs)

    return pad


@rule(RULES, "rev")
def _rev(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    moved = lazy
    for i in eqn.params["dimensions"]:
        axis = lazy.axes[i]
        moved = moved.map_axis(axis, lambda x, at: lax.rev(x, [at]), axis)
    return view_of(eqn, moved, lazy.axes)


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
    return view_of(eqn, moved, axes)


@rule(RULES, "reduce_sum")
def _reduce_sum(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Drop the axis from the view alone: a factor keeps it, so the next product sums over it."""
    (lazy,) = args
    gone = [lazy.axes[i] for i in eqn.params["axes"]]
    held = [lazy.holders(axis) for axis in gone]
    if lazy.a is not None and not all({"a", "b"} & {*h} and "gain" not in h for h in held):
        return NotImplemented
    return view_of(eqn, lazy, [axis for axis in lazy.axes if axis not in gone])


@rule(RULES, "split")
def _split(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    (lazy,) = args
    at, start, outs = eqn.params["axis"], 0, []
    bases = bind_base(eqn, [lazy.w])
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
    bases = bind_base(eqn, [lazy.w])
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
    """Note that the parameter axes that `axis` comes from were indexed away."""
    return dataclasses.replace(lazy, origin=lazy.origin.index_away(axis.origins))
