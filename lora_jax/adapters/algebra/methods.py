"""The methods that combine adapters: what each adds up, and what it leaves out."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

MajoritySign = Literal["total", "frequency"]
MAJORITY_SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to combine the updates scaleᵢ·Aᵢ·Bᵢ of several adapters with weights wᵢ.

    Attributes:
      sums: what is added up. "ranks": nothing, the factors stand side by side, and the rank is the
        sum of theirs. "factors": A's with A's and B's with B's. "updates": the dense updates, of
        which the truncated SVD gives the factors.
      keeps: which elements of each summand stay, a share of `density`: "all", the "largest" ones by
        magnitude, or "random" ones, divided by the density.
      elects: whether only the summands that have an element's majority sign count, as their mean.
    """

    sums: Literal["ranks", "factors", "updates"]
    keeps: Literal["all", "largest", "random"] = "all"
    elects: bool = False


#: The methods of PEFT's `add_weighted_adapter`, by the names that they have there.
METHODS = {
    "cat": Method("ranks"),
    "linear": Method("factors"),
    "svd": Method("updates"),
    "ties": Method("factors", "largest", elects=True),
    "ties_svd": Method("updates", "largest", elects=True),
    "dare_linear": Method("factors", "random"),
    "dare_linear_svd": Method("updates", "random"),
    "dare_ties": Method("factors", "random", elects=True),
    "dare_ties_svd": Method("updates", "random", elects=True),
    "magnitude_prune": Method("factors", "largest"),
    "magnitude_prune_svd": Method("updates", "largest"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method with its options; the verb has checked them.

    Attributes:
      method: a row of `METHODS`.
      density: the share of elements that stay, from 0 to 1.
      majority_sign: how the sign is elected: that of the "total", or the most frequent one.
      rank: of the result, where it is an SVD's.
      exact: whether the SVD of a dense sum is exact, and not randomized.
    """

    method: Method
    density: float = 1.0
    majority_sign: MajoritySign = "total"
    rank: int = 1
    exact: bool = True


def keep_largest(values: jax.Array, density: float) -> jax.Array:
    """Return where the ⌊density·mn⌋ elements of largest magnitude of each matrix are.

    Args:
      values: `[*batch, m, n]`. The first of equal elements stay.
      density: from 0 to 1.

    >>> keep_largest(jnp.array([[1.0, -3.0], [2.0, 0.5]]), density=0.5)
    Array([[False,  True],
           [ True, False]], dtype=bool)
    """
    *batch, m, n = values.shape
    count = int(density * m * n)
    if not count:
        return jnp.zeros(values.shape, bool)
    # Magnitudes order as their bits do. Building the count-th largest one from its highest bit down
    # passes over the values once per bit, which takes far less time than sorting them.
    integer = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = lax.bitcast_convert_type(jnp.abs(values), integer).reshape(-1, m * n)

    def with_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        larger = found | (jnp.ones((), integer) << (8 * integer.itemsize - 2 - i).astype(integer))
        return jnp.where((bits >= larger).sum(-1, keepdims=True) >= count, larger, found)

    start = jnp.zeros((len(bits), 1), integer)
    least = lax.fori_loop(0, 8 * integer.itemsize - 1, with_bit, start)
    above, equal = bits > least, bits == least
    first = jnp.cumsum(equal, -1) <= count - above.sum(-1, keepdims=True)
    return (above | (equal & first)).reshape(*batch, m, n)


def choose_masks(
    values: jax.Array, draw: Callable[[int, tuple[int, ...]], jax.Array], recipe: Recipe
) -> jax.Array | None:
    """Return which elements stay, of the shape of `values`; None for all.

    Args:
      values: `[adapters, *batch, m, n]`.
      draw: `draw(number, shape)` returns the random mask of the adapter with this number.
      recipe: the method and its options.
    """
    if recipe.method.keeps == "all" or recipe.density == 1:
        return None
    if recipe.method.keeps == "largest":
        return keep_largest(values, recipe.density)
    return jnp.stack([draw(number, x.shape) for number, x in enumerate(values)])


def sum_values(
    values: jax.Array, weights: jax.Array, masks: jax.Array | None, recipe: Recipe
) -> jax.Array:
    """Return the weighted sum of what stays of some values, as the method takes it.

    Without an election that is Σ wᵢ·x̃ᵢ, where x̃ᵢ is what the mask leaves of xᵢ, divided by the
    density if it is random (DARE, https://arxiv.org/abs/2311.03099). With one
    (TIES, https://arxiv.org/abs/2306.01708) each element has the sign of Σ x̃ᵢ, or the most frequent
    one, + if they are even. The result is the sum of wᵢ·x̃ᵢ over the adapters that have this sign,
    divided by their number. The weights do not take part in the election.

    Args:
      values: `[adapters, *batch, m, n]`, floating.
      weights: `[adapters, *batch]`.
      masks: which values stay, as `values`; None for all.
      recipe: the method and its options.

    Returns:
      `[*batch, m, n]`.

    >>> values, weights = jnp.array([[[3.0, 1.0]], [[-1.0, 2.0]]]), jnp.array([1.0, 10.0])
    >>> sum_values(values, weights, None, Recipe(METHODS["ties"]))
    Array([[ 3. , 10.5]], dtype=float32)
    """
    if masks is not None:
        values = jnp.where(masks, values, 0)
        values = values / recipe.density if recipe.method.keeps == "random" else values
    weighted = jnp.expand_dims(weights, range(weights.ndim, values.ndim)) * values
    if not recipe.method.elects:
        return weighted.sum(0)
    signs = jnp.sign(values)
    tally = (values if recipe.majority_sign == "total" else signs).sum(0)
    agree = signs == jnp.where(tally >= 0, 1, -1)[None].astype(signs.dtype)
    return jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0), 1).astype(values.dtype)
