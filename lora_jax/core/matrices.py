"""A weight as matrices `[fan_in, fan_out]`, one per index of its batch axes."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lora_jax.core.layout import Layout
from lora_jax.core.quantized.weight import dequantized, is_quantized
from lora_jax.core.sharding.meshes import gathered


def to_matrices(w: jax.Array, layout: Layout) -> jax.Array:
    """Return `w` as `[*batch, fan_in, fan_out]`: its in axes flattened, and its out axes.

    >>> import jax.numpy as jnp
    >>> to_matrices(jnp.zeros((12, 768, 4, 64)), Layout("bioo")).shape
    (12, 768, 256)
    """
    batch = layout.select("b", w.shape)
    return w.transpose(_order(layout)).reshape(
        *batch, layout.fan_in(w.shape), layout.fan_out(w.shape)
    )


def from_matrices(matrices: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """Return the weight of this shape for which `to_matrices` gives `matrices`."""
    order = _order(layout)
    grouped = matrices.reshape(tuple(shape[i] for i in order))
    return grouped.transpose([order.index(i) for i in range(len(order))])


def map_matrices(fn: Callable[..., Any], key: jax.Array, layout: Layout, *weights: Any) -> Any:
    """Apply `fn(key, *matrices)` to each matrix of some weights of one layout.

    The results are stacked as `[*batch, ...]`. The matrices are processed one after the other, each
    with a separate key, so that a stack of layers takes one layer's temporary memory. On a mesh
    with explicit axes the weights are gathered first, because decompositions take only whole
    matrices there, and the results are whole on every device. Quantized weights are
    dequantized, one matrix at a time where their batch axes come first.
    """
    batch = layout.select("b", weights[0].shape)
    if not layout.axes.startswith("b" * len(batch)):
        weights = tuple(map(dequantized, weights))

    def stacked(w: Any) -> Any:
        if is_quantized(w):
            return jax.tree.map(lambda x: gathered(x).reshape(-1, *x.shape[len(batch) :]), w)
        stack = to_matrices(gathered(w), layout)
        return stack.reshape(-1, *stack.shape[-2:])

    def one(args: tuple[Any, ...]) -> Any:
        return fn(args[0], *(_one_matrix(w, layout, len(batch)) for w in args[1:]))

    keys = jax.random.split(key, math.prod(batch))
    results = lax.map(one, (keys, *map(stacked, weights)))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)


def _one_matrix(w: Any, layout: Layout, n_batch: int) -> jax.Array:
    """Return a matrix as it is, and a quantized weight without its batch axes as a matrix."""
    if not is_quantized(w):
        return w
    return to_matrices(w.dequantize(), Layout(layout.axes[n_batch:]))


def as_factors(
    a: jax.Array, b: jax.Array, layout: Layout, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return A and B, given with flattened in and out axes, as `[*batch, *in, rank]` and so on."""
    rank = a.shape[-1]
    return a.reshape(layout.a_shape(shape, rank)), b.reshape(layout.b_shape(shape, rank))


def factor_matrices(a: jax.Array, b: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Return A as `[*batch, fan_in, rank]` and B as `[*batch, rank, fan_out]`.

    There may be more leading axes than the layout's batch axes, such as the slots of a stack. On a
    mesh with explicit axes they are gathered, because decompositions take only whole matrices.

    >>> import jax.numpy as jnp
    >>> a, b = factor_matrices(jnp.zeros((5, 2)), jnp.zeros((2, 3, 4)), Layout("ioo"))
    >>> a.shape, b.shape
    ((5, 2), (2, 12))
    """
    a, b = gathered(a), gathered(b)
    n, rank = a.ndim - 1 - len(layout.positions("i")), a.shape[-1]
    return a.reshape(*a.shape[:n], -1, rank), b.reshape(*b.shape[:n], rank, -1)


def _order(layout: Layout) -> tuple[int, ...]:
    return (*layout.positions("b"), *layout.positions("i"), *layout.positions("o"))
