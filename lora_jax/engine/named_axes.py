"""Arithmetic on arrays with named axes; knows nothing about weights or programs."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.sharding.meshes import sharding_of_product

Names = Sequence[Hashable]


def sizes_of(*operands: tuple[Any, Names]) -> dict[Hashable, int]:
    """Return the size of every named axis of these (array, names) pairs."""
    return {n: d for x, names in operands for n, d in zip(names, x.shape, strict=True)}


def result_names(x: Names, y: Names, keep: Collection[Hashable]) -> tuple[Hashable, ...]:
    """Return the names of `contract`'s result: [*shared, *only in x, *only in y], all in `keep`."""
    shared = tuple(n for n in x if n in y and n in keep)
    alone = [n for n in x if n in keep and n not in y] + [n for n in y if n in keep and n not in x]
    return (*shared, *alone)


def flops(x: Names, y: Names, sizes: Mapping[Hashable, int]) -> int:
    """Count the multiply-adds of contracting `x` with `y`: the product of all their sizes."""
    return math.prod(sizes[n] for n in {*x, *y})


def sum_out(x: jax.Array, names: Names, unwanted: Collection[Hashable]) -> tuple[jax.Array, Names]:
    """Sum `x` over the named axes in `unwanted`."""
    dims = tuple(i for i, n in enumerate(names) if n in unwanted)
    return (x.sum(dims), [n for n in names if n not in unwanted]) if dims else (x, names)


def contract(
    x: jax.Array,
    x_names: Names,
    y: jax.Array,
    y_names: Names,
    keep: Collection[Hashable],
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> tuple[jax.Array, tuple[Hashable, ...]]:
    """Contract two operands by one `dot_general`: every axis that is not in `keep` is summed over.

    Returns the result and its names, in the order of `result_names`.
    """
    x, x_names = sum_out(x, x_names, {n for n in x_names if n not in keep and n not in y_names})
    y, y_names = sum_out(y, y_names, {n for n in y_names if n not in keep and n not in x_names})
    batch = [n for n in x_names if n in y_names and n in keep]
    summed = [n for n in x_names if n in y_names and n not in keep]

    def positions(names: Names, wanted: Names) -> list[int]:
        return [list(names).index(n) for n in wanted]

    names = result_names(x_names, y_names, keep)
    out = lax.dot_general(
        x,
        y,
        (
            (positions(x_names, summed), positions(y_names, summed)),
            (positions(x_names, batch), positions(y_names, batch)),
        ),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=sharding_of_product([(x, x_names), (y, y_names)], names),
    )
    return out, names


def arrange(x: jax.Array, names: Names, wanted: Names, sizes: Mapping[Hashable, int]) -> jax.Array:
    """Transpose `x` to the order `wanted`, broadcast along axes that it lacks, of `sizes`."""
    own = sizes_of((x, names))
    present = [n for n in wanted if n in names]
    order = [list(names).index(n) for n in present]
    if order != list(range(len(order))):
        x = x.transpose(order)
    if len(present) < len(wanted):
        shape = tuple(own[n] if n in own else sizes[n] for n in wanted)
        x = lax.broadcast_in_dim(x, shape, [list(wanted).index(n) for n in present])
    return x


def move_first(x: jax.Array, names: Names, name: Hashable) -> tuple[jax.Array, Names]:
    """Move the named axis to the front; return the array and its names."""
    position = list(names).index(name)
    rest = [n for n in names if n != name]
    return (jnp.moveaxis(x, position, 0) if position else x), [name, *rest]


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return which axes of `old` become which axes of `new` in a reshape, in the finest groups.

    Axes of size one are in no group; neither shape may contain a zero.

    >>> reshape_groups((6, 1, 4, 5), (2, 3, 20))
    [((0,), (0, 1)), ((2, 3), (2,))]
    """
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [j for j, size in enumerate(new) if size != 1]
    groups = []
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (p := math.prod(old[i] for i in left)) != (q := math.prod(new[j] for j in right)):
            if p < q:
                left.append(olds.pop(0))
            else:
                right.append(news.pop(0))
        groups.append((tuple(left), tuple(right)))
    return groups
