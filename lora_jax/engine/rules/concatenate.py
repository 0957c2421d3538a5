"""Rules that make one weight of several: concatenate, stack, select."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import wider
from lora_jax.engine import jaxprs, named_axes, provenance
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, RANK, SLOT, Axis, LazyWeight, is_lazy
from lora_jax.engine.rows.slots import pick, with_scale_in_b
from lora_jax.engine.rules.registry import PrimitiveRule, rule
from lora_jax.engine.rules.views import bind_base, spread

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "concatenate")
def _concatenate(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Concatenate the weights and, along the same axis, their factors."""
    at = eqn.params["dimension"]
    sizes = [atom.aval.shape[at] for atom in eqn.invars]
    return _join(eqn, args, args, lambda parts: _concatenate_members(parts, sizes, at))


@rule(RULES, "stack")
def _stack(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Concatenate along a new axis. No factor has it, so it becomes a batch axis."""
    at = eqn.params["axis"]

    def add_axis(x: LazyWeight) -> LazyWeight:
        axes = (*x.axes[:at], x.new_axis(), *x.axes[at:])
        return dataclasses.replace(x, axes=axes, shape=(*x.shape[:at], 1, *x.shape[at:]))

    parts = [add_axis(x) if is_lazy(x) else x for x in args]
    return _join(eqn, args, parts, lambda parts: _concatenate_members(parts, [1] * len(parts), at))


@rule(RULES, "select_n")
def _select(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Select one of several weights or arrays, and so one of their factors.

    By a scalar, or per example, as `cond` and `switch` under `vmap` do: then each example has its
    own factors, as it has its own weight in the program.
    """
    which, *cases = args
    if is_lazy(which):
        return NotImplemented
    varying = jaxprs.varying_dimensions(ctx.made, eqn.invars[0])
    if ctx.infers and any(x.axes[d].origins for x in cases if is_lazy(x) for d in varying):
        return NotImplemented  # an elementwise mask
    constant = [0 if d not in varying else slice(None) for d in range(which.ndim)]
    once = tuple(slice(0, 1) if d not in varying else slice(None) for d in range(which.ndim))
    return _join(
        *(eqn, args, cases),
        lambda parts: _select_members(which[tuple(constant)], varying, parts),
        which[once],
    )


Parts = Sequence[LazyWeight | None]  # None for an array, which has no update


def _join(
    eqn: Any,
    args: Sequence[Any],
    parts: Sequence[Any],
    combine: Callable[[Parts], dict[str, Any] | None],
    which: Any = None,
) -> Any:
    """Return one weight made of the parts: its base by the equation, its members by `combine`.

    `which` is as in `moves.apply`.
    """
    weights = [x for x in parts if is_lazy(x)]
    if any(x.scale is not weights[0].scale or (x.row is None) for x in weights):
        some = any(x.row is None for x in weights)
        parts = [(pick(x) if some else with_scale_in_b(x)) if is_lazy(x) else x for x in parts]
        weights = [x for x in parts if is_lazy(x)]
    if any(x.origin.looked_up for x in weights):
        return NotImplemented  # rows are an activation
    tangent = any(x.w is None for x in weights)
    if tangent and not all(is_lazy(x) and x.w is None for x in parts):
        return NotImplemented
    aval = eqn.outvars[0].aval
    (w,) = [None] if tangent else bind_base(eqn, [x.w if is_lazy(x) else x for x in args], which)
    common = iter(_name_axes_alike(weights))
    named = [next(common) if is_lazy(x) else None for x in parts]
    # A quantized weight without adapters has no update, as an array has none.
    adapted = [None if x is None or x.a is None else x for x in named]
    first = next(filter(None, adapted), None) or next(filter(None, named))
    altered = first.origin.altered or len(weights) < len(parts)
    origin = dataclasses.replace(first.origin, altered=altered)
    whole = dataclasses.replace(first, w=w, shape=aval.shape, dtype=aval.dtype, origin=origin)
    if first.a is None:
        return [whole]
    oriented = _orient_alike(adapted)
    members = None if oriented is None else combine(oriented)
    return NotImplemented if members is None else [dataclasses.replace(whole, **members)]


def _name_axes_alike(weights: Sequence[LazyWeight]) -> list[LazyWeight]:
    """Return the weights with the same name for each axis, whose origins are those of all."""
    origin, numbers = provenance.join([x.origin for x in weights])
    axes = []
    for uid, column in enumerate(zip(*(x.axes for x in weights), strict=True)):
        origins = {n[o] for axis, n in zip(column, numbers, strict=True) for o in axis.origins}
        axes.append(Axis(tuple(sorted(origins)), uid))
    return [dataclasses.replace(x.rename_axes(axes), origin=origin) for x in weights]


def _orient_alike(parts: Parts) -> Parts | None:
    """Return the parts with the same axes on A and on B; None if swapping does not help."""
    weights = [x for x in parts if x is not None]
    first = weights[0]
    wanted = set(first.a_axes), set(first.b_axes)
    if not wanted[0] | wanted[1] <= {RANK, SLOT, *first.axes}:
        return None
    if len({(x.dropout, x.key is None) for x in weights}) > 1 or any(
        x.rate is not weights[0].rate for x in weights
    ):
        return None
    oriented: list[LazyWeight | None] = []
    for x in parts:
        if x is not None and (set(x.a_axes), set(x.b_axes)) != wanted:
            if (set(x.b_axes), set(x.a_axes)) != wanted or x.key is not None:
                return None
            x = dataclasses.replace(x, a=x.b, a_axes=x.b_axes, b=x.a, b_axes=x.a_axes)
        oriented.append(x)
    return oriented


def _select_members(which: Any, varying: Sequence[int], parts: Parts) -> dict[str, Any] | None:
    """Return the factors of the selected part; None where the parts' shapes differ.

    `which` has the dimensions `varying` of the view. An axis that one factor alone has is none of
    them: the other factor would have to be selected along it too, and be as large as the weight.
    """
    first = next(x for x in parts if x is not None)
    if all(x is not None and _has_members_of(x, first) for x in parts):
        return {}  # one and the same weight
    along = [first.axes[d] for d in varying]
    if any(len({"a", "b"} & {*first.holders(axis)}) == 1 for axis in along):
        return None
    have_gains = _all_have_gain(parts)
    if not have_gains and any(x is not None and x.gain is not None for x in parts):
        return None
    names = ("a", "b", *(["gain"] if have_gains else []))
    for axis in along:
        parts = [x and spread(x, axis, names) for x in parts]
    first = next(x for x in parts if x is not None)
    members: dict[str, Any] = {}
    for name in names:
        arrays, axes = _align(parts, name), first.axes_of(name)
        given = [x for x in arrays if x is not None]
        if len({x.shape for x in given}) > 1:
            return None
        cases = [jnp.zeros_like(given[0]) if x is None else x for x in arrays]
        sizes = named_axes.sizes_of((given[0], axes))
        chosen = named_axes.arrange(which, along, axes, sizes) if along else which
        members |= {name: lax.select_n(chosen, *cases), f"{name}_axes": axes}
    return members


def _has_members_of(x: LazyWeight, other: LazyWeight) -> bool:
    """Return whether two views have the very same factors."""
    return all(getattr(x, name) is getattr(other, name) for name, _ in MEMBERS)


def _concatenate_members(parts: Parts, sizes: Sequence[int], at: int) -> dict[str, Any] | None:
    """Return the members of all parts, which are `sizes` long along dimension `at`."""
    first = next(x for x in parts if x is not None)
    along = first.axes[at]
    if along not in first.a_axes + first.b_axes:
        parts = [x and spread(x, along, ("a", "b", "key", "gain")) for x in parts]
        first = next(x for x in parts if x is not None)
    both = along in first.a_axes and along in first.b_axes
    members = _stack_members(parts, sizes, along) if both else _lay_in_blocks(parts, sizes, along)
    gains = _joined_gain(parts, sizes, along)
    return None if members is None or gains is None else members | gains


def _joined_gain(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """Return the gain of all parts: joined along the axis, or the same for all; else None."""
    weights = [x for x in parts if x is not None]
    if not _all_have_gain(parts):
        return {} if all(x.gain is None for x in weights) else None
    if along in weights[0].gain_axes:
        return _append(parts, "gain", sizes, along)
    return {} if all(x.gain is weights[0].gain for x in weights) else None


def _all_have_gain(parts: Parts) -> bool:
    """Return whether every part is a weight with a gain along the same axes."""
    axes = {frozenset(x.gain_axes) for x in parts if x is not None}
    return len(axes) == 1 and all(x is not None and x.gain is not None for x in parts)


def _stack_members(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """Concatenate both factors along an axis that both have."""
    if len({x.rank for x in parts if x is not None}) > 1:
        return None
    members = _append(parts, "a", sizes, along) | _append(parts, "b", sizes, along)
    has_keys = any(x is not None and x.key is not None for x in parts)
    return members | (_append(parts, "key", sizes, along) if has_keys else {})


def _lay_in_blocks(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """Concatenate the factor that has the axis, each part in its own block of the rank.

    With parts `[in, n₁]` and `[in, n₂]` of rank r, A is `[in, 2·r]` and B `[2·r, n₁ + n₂]`, with
    zeros in two of its four blocks. Where all parts share A (slices of one weight), the rank stays
    r and B is `[r, n₁ + n₂]`.
    """
    weights = [x for x in parts if x is not None]
    one, other = ("a", "b") if along in weights[0].a_axes else ("b", "a")
    if all(getattr(x, other) is getattr(weights[0], other) for x in weights):
        return _append(parts, one, sizes, along)
    if not weights[0].probe and not _pays(weights, sum(sizes), along, other):
        return None
    total, before, blocks = sum(x.rank for x in weights), 0, []
    for x in parts:
        blocks.append(x and _widen_rank(x, one, before, total))
        before += 0 if x is None else x.rank
    ranks = [x.rank for x in weights]
    return _append(blocks, one, sizes, along) | _append(weights, other, ranks, RANK)


def _pays(weights: Sequence[LazyWeight], size: int, along: Axis, other: str) -> bool:
    """Return whether the branch takes fewer operations than a dense weight, zeros included."""
    first, rank = weights[0], sum(x.rank for x in weights)
    own = [axis for axis in first.axes_of(other) if axis not in (RANK, SLOT)]
    rows = math.prod(first.sizes[axis] for axis in own)
    columns = math.prod(n for axis, n in first.sizes.items() if axis not in (*own, along)) * size
    return rank * (rows + columns) < rows * columns


def _widen_rank(x: LazyWeight, factor: str, before: int, total: int) -> LazyWeight:
    """Pad one factor with zeros, `before` its own part of the rank and after it, up to `total`."""
    array, axes = getattr(x, factor), x.axes_of(factor)
    after = total - before - x.rank
    widths = [(before, after) if axis == RANK else (0, 0) for axis in axes]
    changes: dict[str, Any] = {factor: jnp.pad(array, widths)}
    return dataclasses.replace(x, **changes)


def _append(parts: Parts, name: str, sizes: Sequence[int], along: Axis) -> dict[str, Any]:
    """Concatenate one member of all parts along an axis; return it and its axes, by field."""
    arrays = _align(parts, name)
    like = next(x for x in arrays if x is not None)
    axes = next(x for x in parts if x is not None).axes_of(name)
    at = axes.index(along)

    def filled(x: jax.Array | None, size: int) -> jax.Array:
        if x is not None:
            return x
        shape = (*like.shape[:at], size, *like.shape[at + 1 :])
        if name == "key":  # an array has no branch to drop from
            return jnp.broadcast_to(lax.slice_in_dim(like, 0, 1, axis=at), shape)
        return jnp.zeros(shape, like.dtype)

    pieces = [filled(x, size) for x, size in zip(arrays, sizes, strict=True)]
    return {name: jnp.concatenate(pieces, at), f"{name}_axes": axes}


def _align(parts: Parts, name: str) -> list[jax.Array | None]:
    """Return one member of each part, in the same order of axes and the same dtype."""
    axes = next(x for x in parts if x is not None).axes_of(name)
    arrays = [
        None if x is None else named_axes.arrange(getattr(x, name), x.axes_of(name), axes, {})
        for x in parts
    ]
    dtypes = {x.dtype for x in arrays if x is not None}
    if len(dtypes) == 1:
        return arrays
    wide = wider(*dtypes)
    return [None if x is None else x.astype(wide) for x in arrays]
