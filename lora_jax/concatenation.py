"""Rules that make one weight of several: concatenated kernels, stacked kernels."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _contract, _jaxpr
from lora_jax.context import Context
from lora_jax.lazy import RANK, Axis, LazyWeight, is_lazy
from lora_jax.rules import Rule, rule
from lora_jax.views import spread

RULES: dict[str, Rule] = {}


@rule(RULES, "concatenate")
def _concatenate(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    at = eqn.params["dimension"]
    return _join(eqn, args, args, [atom.aval.shape[at] for atom in eqn.invars], at)


@rule(RULES, "stack")
def _stack(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Concatenation along an axis that no factor has: it becomes a batch axis."""
    at = eqn.params["axis"]

    def expanded(x: LazyWeight) -> LazyWeight:
        axes = (*x.axes[:at], x.new_axis(), *x.axes[at:])
        return dataclasses.replace(x, axes=axes, shape=(*x.shape[:at], 1, *x.shape[at:]))

    parts = [expanded(x) if is_lazy(x) else x for x in args]
    return _join(eqn, args, parts, [1] * len(parts), at)


def _join(
    eqn: Any, args: Sequence[Any], parts: Sequence[Any], sizes: Sequence[int], at: int
) -> Any:
    """The parts, `sizes` long along dimension `at`, as one weight; arrays among them are fixed."""
    weights = [x for x in parts if is_lazy(x)]
    if any(x.looked_up for x in weights):
        return NotImplemented  # rows are an activation
    tangent = any(x.w is None for x in weights)
    if tangent and not all(is_lazy(x) and x.w is None for x in parts):
        return NotImplemented
    aval = eqn.outvars[0].aval
    w = None if tangent else _jaxpr.bind(eqn, [x.w if is_lazy(x) else x for x in args])[0]
    common = iter(_with_common_axes(weights))
    named = [next(common) if is_lazy(x) else None for x in parts]
    first = next(filter(None, named))
    altered = first.altered or len(weights) < len(parts)
    whole = dataclasses.replace(first, w=w, shape=aval.shape, dtype=aval.dtype, altered=altered)
    if first.a is None:
        return [whole]
    members = _members(named, sizes, first.axes[at])
    return NotImplemented if members is None else [dataclasses.replace(whole, **members)]


def _with_common_axes(weights: Sequence[LazyWeight]) -> list[LazyWeight]:
    """The same weights under one set of names for axes, which come from the axes of all of them."""
    sources = dict(source for x in weights for source in x.sources)
    starts, start = {}, 0
    for path, ndim in sources.items():
        starts[path] = start
        start += ndim

    def shifted(x: LazyWeight, origins: Sequence[int]) -> list[int]:
        """Origins among the axes of all parameters, from origins among those of `x`."""
        table = [starts[path] + i for path, ndim in x.sources for i in range(ndim)]
        return [table[o] for o in origins]

    uids = range(len(weights[0].axes))
    origins = [{o for x in weights for o in shifted(x, x.axes[i].origins)} for i in uids]
    axes = [Axis(tuple(sorted(o)), i) for i, o in zip(uids, origins, strict=True)]
    indexed = {o for x in weights for o in shifted(x, x.indexed)}
    provenance: dict[str, Any] = {
        "path": " + ".join(sources),
        "parts": tuple(sources.items()),
        "ndim": start,
        "indexed": tuple(sorted(indexed)),
        "altered": any(x.altered for x in weights),
    }
    return [dataclasses.replace(x.renamed(axes), **provenance) for x in weights]


Parts = Sequence[LazyWeight | None]


def _members(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """The factors of the whole, or None; a part that is None is an array, with no update."""
    weights = [x for x in parts if x is not None]
    first = weights[0]
    if not set(first.a_axes + first.b_axes) <= {RANK, *first.axes}:
        return None
    if len({(x.dropout, x.key is None) for x in weights}) > 1:
        return None
    aligned = [x and _oriented_like(first, x) for x in parts]
    if sum(x is not None for x in aligned) < len(weights):
        return None
    if along not in first.a_axes + first.b_axes:
        aligned = [x and spread(x, along, ("a", "b", "key")) for x in aligned]
        first = next(filter(None, aligned))
    if along in first.a_axes and along in first.b_axes:
        return _stacked(aligned, sizes, along)
    return _in_blocks(aligned, sizes, along)


def _oriented_like(first: LazyWeight, x: LazyWeight) -> LazyWeight | None:
    """A weight with its axes on the same factors as those of `first`: A and B may trade places."""
    wanted = set(first.a_axes), set(first.b_axes)
    if (set(x.a_axes), set(x.b_axes)) == wanted:
        return x
    if (set(x.b_axes), set(x.a_axes)) != wanted or x.key is not None:
        return None
    return dataclasses.replace(x, a=x.b, a_axes=x.b_axes, b=x.a, b_axes=x.a_axes)


def _stacked(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """Both factors have the axis: each is concatenated along it."""
    if len({x.rank for x in parts if x is not None}) > 1:
        return None
    members = _along(parts, "a", sizes, along) | _along(parts, "b", sizes, along)
    has_keys = any(x is not None and x.key is not None for x in parts)
    return members | (_along(parts, "key", sizes, along) if has_keys else {})


def _in_blocks(parts: Parts, sizes: Sequence[int], along: Axis) -> dict[str, Any] | None:
    """One factor has the axis: its parts follow each other along it, in blocks along the rank.

    Where all parts share the other factor (slices of one weight) there is one block of rank.
    """
    weights = [x for x in parts if x is not None]
    one, other = ("a", "b") if along in weights[0].a_axes else ("b", "a")
    if all(getattr(x, other) is getattr(weights[0], other) for x in weights):
        return _along(parts, one, sizes, along)
    if not _pays(weights, sum(sizes), along, other):
        return None
    total, before, blocks = sum(x.rank for x in weights), 0, []
    for x in parts:
        blocks.append(x and _widened(x, one, before, total))
        before += 0 if x is None else x.rank
    ranks = [x.rank for x in weights]
    return _along(blocks, one, sizes, along) | _along(weights, other, ranks, RANK)


def _pays(weights: Sequence[LazyWeight], size: int, along: Axis, other: str) -> bool:
    """Whether the branch, which multiplies zeros too, takes fewer operations than the whole."""
    first, rank = weights[0], sum(x.rank for x in weights)
    own = [axis for axis in getattr(first, f"{other}_axes") if axis != RANK]
    rows = math.prod(first.sizes[axis] for axis in own)
    columns = math.prod(n for axis, n in first.sizes.items() if axis not in (*own, along)) * size
    return rank * (rows + columns) < rows * columns


def _widened(x: LazyWeight, factor: str, before: int, total: int) -> LazyWeight:
    """The weight with zeros around one factor's part of the rank."""
    array, axes = getattr(x, factor), getattr(x, f"{factor}_axes")
    after = total - before - x.rank
    widths = [(before, after) if axis == RANK else (0, 0) for axis in axes]
    changes: dict[str, Any] = {factor: jnp.pad(array, widths)}
    return dataclasses.replace(x, **changes)


def _along(parts: Parts, name: str, sizes: Sequence[int], along: Axis) -> dict[str, Any]:
    """One member of all parts, concatenated along an axis: its array and the names of its axes."""
    field = f"{name}_axes"
    first = next(filter(None, parts))
    axes, like = getattr(first, field), getattr(first, name)
    at = axes.index(along)
    arrays = [
        None if x is None else _contract.arrange(getattr(x, name), getattr(x, field), axes, {})
        for x in parts
    ]
    wide = functools.reduce(_wider, [x.dtype for x in arrays if x is not None])

    def filled(x: jax.Array | None, size: int) -> jax.Array:
        if x is not None:
            return x.astype(wide) if name != "key" else x
        shape = (*like.shape[:at], size, *like.shape[at + 1 :])
        if name == "key":  # an array has nothing to drop
            return jnp.broadcast_to(jax.lax.slice_in_dim(like, 0, 1, axis=at), shape)
        return jnp.zeros(shape, wide)

    filled_in = [filled(x, size) for x, size in zip(arrays, sizes, strict=True)]
    return {name: jnp.concatenate(filled_in, at), field: axes}


def _wider(one: Any, two: Any) -> Any:
    return one if one == two else jnp.promote_types(one, two)
