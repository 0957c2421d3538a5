"""A weight as matrices `[fan_in, fan_out]`, one for each element of its batch axes."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lora_jax.core.layout import Layout


def to_matrices(w: jax.Array, layout: Layout) -> jax.Array:
    """`[*batch, fan_in, fan_out]`: in axes flattened into one, out axes into another.

    >>> import jax.numpy as jnp
    >>> to_matrices(jnp.zeros((12, 768, 4, 64)), Layout("bioo")).shape
    (12, 768, 256)
    """
    batch = layout.select("b", w.shape)
    return w.transpose(_order(layout)).reshape(
        *batch, layout.fan_in(w.shape), layout.fan_out(w.shape)
    )


def from_matrices(matrices: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """The weight of this shape whose `to_matrices` is `matrices`."""
    order = _order(layout)
    grouped = matrices.reshape(tuple(shape[i] for i in order))
    return grouped.transpose([order.index(i) for i in range(len(order))])


def map_matrices(fn: Callable[..., Any], key: jax.Array, layout: Layout, *weights: Any) -> Any:
    """`fn(key, *matrices)` of each matrix of some weights of one layout, stacked `[*batch, ...]`.

    One after the other, so that a stack of layers takes one layer's temporary memory; each gets a
    key of its own.
    """
    stacks = [to_matrices(w, layout) for w in weights]
    batch = stacks[0].shape[:-2]
    flat = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]
    keys = jax.random.split(key, math.prod(batch))
    results = lax.map(lambda args: fn(*args), (keys, *flat))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)


def as_factors(
    a: jax.Array, b: jax.Array, layout: Layout, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """A `[*batch, *in, rank]`, B `[*batch, rank, *out]`, given with in and out axes flattened."""
    rank = a.shape[-1]
    return a.reshape(layout.a_shape(shape, rank)), b.reshape(layout.b_shape(shape, rank))


def _order(layout: Layout) -> tuple[int, ...]:
    return (*layout.positions("b"), *layout.positions("i"), *layout.positions("o"))
