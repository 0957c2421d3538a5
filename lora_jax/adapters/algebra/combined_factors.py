"""One weight's factors from those of several adapters, as a recipe says."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.algebra.methods import Recipe, choose_masks, sum_values
from lora_jax.core.dora import dora_gain
from lora_jax.core.dtypes import accumulator, round_to, wider
from lora_jax.core.host_memory import on_device
from lora_jax.core.linalg import matmul, product_svd, randomized_svd, truncated_svd
from lora_jax.core.matrices import as_factors, factor_matrices, to_matrices
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.sharding.meshes import gathered
from lora_jax.core.weights import LoraWeight

#: `draw(number, i, shape)` returns which elements DARE keeps: of the i-th matrix of the number-th
#: adapter's update, or with factors, of all its A's (number 2n) or B's (number 2n + 1).
Draw = Callable[[int, Any, tuple[int, ...]], jax.Array]
Factors = tuple[jax.Array, jax.Array]


def draw_from(key: jax.Array | None, density: float) -> Draw:
    """Return how DARE's masks are drawn: each element stays with a probability of `density`."""

    def draw(number: int, i: Any, shape: tuple[int, ...]) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, number), i)  # type: ignore[arg-type]
        return jax.random.bernoulli(own, density, shape)

    return draw


def combine_factors(
    nodes: Sequence[LoraWeight], weights: jax.Array, base: Any, recipe: Recipe, draw: Draw
) -> LoraWeight:
    """Return the node of an overlay that some nodes of the same weight are combined to.

    Everything is computed in float32 (float64 if a factor is), and rounded once to the widest of
    the dtypes. The scale is 1, or 0 in the layers of a stack that no adapter has.

    Args:
      nodes: of one layout and shape, without their base.
      weights: `[adapters]`, floating.
      base: the base leaf, which the updates of DoRA are computed from; None if none has DoRA.
      recipe: the method and its options.
      draw: where DARE's masks come from.
    """
    first, wide = nodes[0], accumulator(*(x.dtype for node in nodes for x in (node.a, node.b)))
    dtypes = [wider(*(getattr(node, name).dtype for node in nodes)) for name in ("a", "b")]
    factors = [factor_matrices(x.a.astype(wide), x.b.astype(wide), x.layout) for x in nodes]
    scales = jnp.stack([gathered(node.scale).astype(wide) for node in nodes])  # [adapters, *batch]
    weights = jnp.expand_dims(jnp.asarray(weights, wide), range(1, scales.ndim))
    if recipe.method.sums == "ranks":
        a, b = _side_by_side(factors, weights * scales)
    elif recipe.method.sums == "factors":
        a, b = _sum_factors(factors, weights * scales, recipe, draw)
    elif recipe.method.keeps == "all" and base is None:
        u, s, vt = product_svd(*_side_by_side(factors, weights * scales))
        a, b = _to_rank(u, s[..., None] * vt, recipe.rank)
    else:
        a, b = _sum_updates(nodes, factors, (weights, scales), base, recipe, draw)
    a, b = (round_to(x, dtype).astype(dtype) for x, dtype in zip((a, b), dtypes, strict=True))
    a, b = as_factors(a, b, first.layout, first.shape)
    scale = (scales != 0).any(0).astype(first.scale.dtype)
    return LoraWeight(None, a, b, scale, layout=first.layout, dropout=first.dropout)


def _side_by_side(factors: Sequence[Factors], weights: jax.Array) -> Factors:
    """Return [w₁·A₁, w₂·A₂, ...] and [B₁; B₂; ...]."""
    scaled = [a * w[..., None, None] for (a, _), w in zip(factors, weights, strict=True)]
    return jnp.concatenate(scaled, -1), jnp.concatenate([b for _, b in factors], -2)


def _sum_factors(
    factors: Sequence[Factors], weights: jax.Array, recipe: Recipe, draw: Draw
) -> Factors:
    """Return Σ sign(wᵢ)·√|wᵢ|·Aᵢ and Σ √|wᵢ|·Bᵢ, each as the method sums."""
    root = jnp.sqrt(jnp.abs(weights))
    roots = jnp.where(weights < 0, -root, root), root
    stacks = [jnp.stack(side) for side in zip(*factors, strict=True)]

    def of_side(side: int) -> jax.Array:
        values = stacks[side]
        masks = choose_masks(values, lambda n, shape: draw(2 * n + side, 0, shape), recipe)
        return sum_values(values, roots[side], masks, recipe)

    return of_side(0), of_side(1)


def _sum_updates(
    nodes: Sequence[LoraWeight],
    factors: Sequence[Factors],
    weights_and_scales: tuple[jax.Array, jax.Array],
    base: Any,
    recipe: Recipe,
    draw: Draw,
) -> Factors:
    """Return U and S·Vᵀ of the summed updates, which are dense, one matrix after the other."""
    layout, batch = nodes[0].layout, nodes[0].scale.shape
    weights, scales = weights_and_scales
    scaled = [(a * s[..., None, None], b) for (a, b), s in zip(factors, scales, strict=True)]
    gains = [None if x.magnitude is None else _gain(x, base, scales.dtype) for x in nodes]
    w = None
    if base is not None:
        w = to_matrices(gathered(dequantized(on_device(base))), layout).astype(scales.dtype)

    def one(args: tuple[Any, ...]) -> Factors:
        i, factors, gains, w = args
        updates = [_update(a, b, gain, w) for (a, b), gain in zip(factors, gains, strict=True)]
        values = jnp.stack(updates)
        masks = choose_masks(values, lambda n, shape: draw(n, i, shape), recipe)
        total = sum_values(values, weights.reshape(-1), masks, recipe)
        rank = min(recipe.rank, *total.shape)
        if recipe.exact:
            u, s, vt = truncated_svd(total, rank)
        else:
            u, s, vt = randomized_svd(jax.random.key(0), total, rank)
        return u, s[:, None] * vt

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), (scaled, gains, w))
    a, b = lax.map(one, (jnp.arange(math.prod(batch)), *flat))
    a, b = (x.reshape(*batch, *x.shape[1:]) for x in (a, b))
    return _to_rank(a, b, recipe.rank)


def _gain(node: LoraWeight, base: Any, dtype: Any) -> jax.Array:
    """Return the factor by which DoRA multiplies each output, `[*batch, fan_out]`."""
    gain = gathered(dora_gain(dataclasses.replace(node, w=base)))
    return gain.reshape(*node.scale.shape, -1).astype(dtype)


def _update(a: jax.Array, b: jax.Array, gain: jax.Array | None, w: jax.Array | None) -> jax.Array:
    """Return A·B or, with DoRA's gain g, what changes the weight: (g − 1)·W + g·A·B."""
    update = matmul(a, b)
    if gain is None or w is None:
        return update
    return (gain - 1)[None] * w + gain[None] * update


def _to_rank(a: jax.Array, b: jax.Array, rank: int) -> Factors:
    """Return the first columns of A and rows of B, with zeros up to the rank after them."""
    return pad_rank(a[..., :rank], b[..., :rank, :], rank, a.ndim - 2)


def pad_rank(a: jax.Array, b: jax.Array, rank: int, n_batch: int) -> Factors:
    """Return `[*batch, *in, rank]` and `[*batch, rank, *out]`, with zeros at the end."""
    more = rank - a.shape[-1]
    of_b = [(0, more if axis == n_batch else 0) for axis in range(b.ndim)]
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, more)]), jnp.pad(b, of_b)
