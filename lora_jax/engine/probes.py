"""Probes: factors that read the inputs of a weight by a gradient, in place of updating it.

Where an activation x (one row per token) meets the factor A, the gradient with respect to A of

    ½·‖x·A‖²    is  xᵀ·x·A, the second moment of the inputs times A,
    Σ x·A       is  Σx for every column of A,
    Σ x²·A      is  Σx², entry by entry.

So every contraction adds such a term to the program; `tap` lets it reach the gradient, whatever
follows. Automatic differentiation then sums over tokens, loop steps, mapped examples and call
sites, per stacked layer, through every container that the engine knows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import accumulator
from lora_jax.engine.lazy_weight import RANK, LazyWeight

#: The probe whose A is any matrix; its gradient is the second moment times that matrix.
PRODUCTS = "products"
#: The probe whose A is all ones, of rank three; its gradient is Σx, Σx² and the number of inputs.
SUMS = "sums"


@jax.custom_vjp
def tap(y: Any, term: jax.Array) -> Any:
    """Return `y`. The scalar `term` gets the cotangent 1, whatever happens to `y`."""
    return y


def _tap_forward(y: Any, term: jax.Array) -> tuple[Any, jax.Array]:
    return y, term


def _tap_backward(term: jax.Array, cotangent: Any) -> tuple[Any, jax.Array]:
    return cotangent, one_like(term)


tap.defvjp(_tap_forward, _tap_backward)


def one_like(x: jax.Array) -> jax.Array:
    """Return ones like x that, inside a `shard_map`, vary over the same mesh axes as x."""
    return jnp.where(jnp.isnan(x), jnp.ones_like(x), jnp.ones_like(x))


def observe(
    y: Any,
    x: jax.Array,
    lazy: LazyWeight,
    first: Callable[[jax.Array, jax.Array], jax.Array],
    count: int | None = None,
) -> Any:
    """Return `y`, with the inputs `x` of a weight that probes tapped.

    `first(x, a)` is the contraction with the first factor. `count` is the number of inputs. Pass it
    where windows reach beyond the edge of `x`; elsewhere they are counted with ones in place of x.
    """
    x = lax.stop_gradient(x).astype(accumulator(x.dtype, lazy.a.dtype))
    if lazy.probe == PRODUCTS:
        return tap(y, (first(x, lazy.a) ** 2).sum() / 2)
    at = lazy.a_axes.index(RANK)
    # One column per sum; a weight in blocks (concatenated) has one triple per block.
    a, a_squares, a_count = (lax.slice_in_dim(lazy.a, i, lazy.a.shape[at], 3, at) for i in range(3))
    # If the program scales rows of A, it scales the inputs: the former ones show by how much.
    scales = lax.stop_gradient(a_squares)
    a_count = a_count / jnp.where(a_count == 0, 1, lax.stop_gradient(a_count))
    if count is None:
        counted = first(one_like(x), a_count).sum()
    else:
        counted = a_count.sum() * count * one_like(x.reshape(-1)[0])
    return tap(y, first(x, a).sum() + first(x * x, a_squares * scales).sum() + counted)
