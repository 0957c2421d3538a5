"""`combine`: one adapter from several, by PEFT's methods."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.algebra.combined_factors import combine_factors, draw_from
from lora_jax.adapters.algebra.combined_values import combine_values
from lora_jax.adapters.algebra.methods import MajoritySign, Recipe
from lora_jax.adapters.algebra.misfits import (
    find_misfits,
    find_missing_base,
    find_unfit_dora,
    is_dora,
    stays,
)
from lora_jax.adapters.algebra.options import as_weights, recipe_of
from lora_jax.adapters.algebra.overlays import Overlays
from lora_jax.adapters.algebra.placed import place_like
from lora_jax.core.abstract import on_shapes
from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.host_memory import on_device
from lora_jax.core.paths import path_key
from lora_jax.core.weights import Adapted, LoraWeight


def combine(
    adapters: Any,
    weights: Sequence[float] | jax.Array | None = None,
    *,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    majority_sign: MajoritySign = "total",
    key: jax.Array | None = None,
    exact: bool = True,
    base: Any = None,
) -> Any:
    """Combine several adapters of one base into one, with PEFT's methods and numbers.

    With updates ΔWᵢ = scaleᵢ·Aᵢ·Bᵢ (so alpha, rsLoRA and `set_scale` count) and weights wᵢ:

    - "cat": A = [w₁·s₁·A₁, w₂·s₂·A₂, ...], B = [B₁; B₂; ...]. Exactly Σ wᵢ·ΔWᵢ; the ranks add up.
    - "svd": the best approximation of Σ wᵢ·ΔWᵢ with the rank `rank`, from the factors alone.
    - "linear": A = Σ sign(wᵢsᵢ)·√|wᵢsᵢ|·Aᵢ, B = Σ √|wᵢsᵢ|·Bᵢ. It adds cross terms Aᵢ·Bⱼ.
    - "ties": A and B are summed as by "linear", but of each only the share `density` of largest
      magnitude, and per element only the values with the majority's sign, whose mean is taken
      (https://arxiv.org/abs/2306.01708). "dare_linear", "dare_ties": a random share `density`,
      divided by it (https://arxiv.org/abs/2311.03099). "magnitude_prune": "linear" of the largest.
    - "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": the same for the dense
      updates ΔWᵢ, and the best approximation of the sum with the rank `rank`.

    Sums, differences and scalings are `combine([x, y])`, `combine([x, y], [1, -1])`,
    `combine([x], [0.5])`. They are what `add_weighted_adapter` of PEFT 0.21.2 computes, except that
    PEFT takes "linear" for a single adapter whatever the method. Each matrix of a stack of layers
    is pruned and approximated by itself. What an adapter does not adapt, it does not take part in.

    Where the initialization changed the base ("pissa", "olora", "loftq"), adapters of different
    starts have different bases: call `on_original` on each first.

    A fully trained leaf becomes base + Σ wᵢ·(valueᵢ − base), where the method prunes and elects the
    changes, of the whole leaf; so do trained rows, of all rows that one of the adapters trains.

    Args:
      adapters: overlays, as `split` and `load` return them, or joined trees of one base; or a
        stack of adapters.
      weights: one number per adapter, a sequence or an array `[adapters]`, which may be traced; by
        default 1 each. A negative weight subtracts.
      method: see above.
      density: the share of elements that stay, from 0 to 1, for the methods that leave some out.
      rank: of the result of methods that end in "svd"; by default the largest rank of an adapter.
        Factors are padded with zeros where an update has a smaller rank.
      majority_sign: whose sign TIES takes: that of the sum ("total"), or the most frequent one.
      key: a random key, for DARE; each path draws separately.
      exact: whether the SVD of dense sums is exact; else it is randomized as in `extract`, which is
        many times faster on large weights.
      base: the parameters, which fully trained leaves and DoRA need. An overlay that has all
        adapted leaves gives the result its structure; with `base` it may be none.

    Returns:
      An overlay for `join(base, overlay)`. Its scale is 1, its dtype the widest of the adapters',
      its dropout that of the first adapter. It is computed in float32 (float64 if a factor is).

    Raises:
      ConfigError: an option is missing, out of range, or not one that the method has.
      StructureError: the adapters do not fit together: shapes or layouts differ, or ranks where a
        method sums factors; or a leaf needs `base`. All such problems are listed at once.

    >>> import jax.numpy as jnp, lora_jax
    >>> rows, one, layout = jnp.eye(2), jnp.float32(1), lora_jax.Layout("io")
    >>> weights = [
    ...     lora_jax.LoraWeight(None, a, jnp.ones((1, 2)), one, layout=layout)
    ...     for a in (rows[:, :1], rows[:, 1:])
    ... ]
    >>> overlay = combine([{"w": weight} for weight in weights], [2, -1])
    >>> lora_jax.merge(lora_jax.join({"w": jnp.zeros((2, 2))}, overlay))["w"]
    Array([[ 2.,  2.],
           [-1., -1.]], dtype=float32)
    """
    overlays = Overlays.of("combine", adapters, base)
    largest = max((rank for nodes in overlays.nodes for rank in _ranks(nodes)), default=1)
    recipe = recipe_of(method, density, rank, majority_sign, key, exact, largest)
    every = as_weights(weights, len(overlays.nodes))
    own = {path: every[np.array(overlays.at(path)[0])] for path in overlays.paths}
    problems = overlays.problems() or _problems(overlays, own, recipe)
    if problems:
        raise StructureError("combine: cannot combine these adapters:\n" + grouped(problems))
    random = recipe.method.keeps == "random" and recipe.density != 1
    make = functools.partial(_combine_leaf, recipe=recipe)
    combined = {}
    for path in overlays.paths:
        _, nodes = overlays.at(path)
        if stays(nodes, own[path], recipe):
            combined[path] = nodes[0]
            continue
        leaf = overlays.base_leaf(path) if _changes_base(nodes) else None
        own_key = path_key(key, path) if random and key is not None else None
        node = on_shapes(make, jax.tree.map(on_device, nodes), own[path], leaf, own_key)
        combined[path] = place_like(node, nodes[0])
    return overlays.rebuild(combined)


def _ranks(nodes: Mapping[str, Adapted]) -> list[int]:
    return [node.rank for node in nodes.values() if isinstance(node, LoraWeight)]


def _changes_base(nodes: Sequence[Adapted]) -> bool:
    """Return whether what nodes change depends on the base: DoRA, and trained values."""
    return is_dora(nodes) or not isinstance(nodes[0], LoraWeight)


def _problems(overlays: Overlays, weights: Mapping[str, Any], recipe: Recipe) -> list[str]:
    found = []
    for path in overlays.paths:
        numbers, nodes = overlays.at(path)
        shape = None if overlays.leaves is None else overlays.leaves[path]
        misfits = find_misfits(path, numbers, nodes, shape, recipe)
        misfits = misfits or find_unfit_dora(path, nodes, weights[path], recipe)
        if not misfits and overlays.base_leaf(path) is None:
            misfits = find_missing_base(path, nodes, weights[path], recipe)
        found += misfits
    return found


@functools.partial(jax.jit, static_argnames="recipe")
def _combine_leaf(
    nodes: list[Any], weights: Any, base: Any, key: jax.Array | None, *, recipe: Recipe
) -> Adapted:
    draw = draw_from(key, recipe.density)
    if isinstance(nodes[0], LoraWeight):
        return combine_factors(nodes, weights, base, recipe, draw)
    return combine_values(nodes, weights, base, recipe, draw)
