"""Why the nodes that several adapters have at one path cannot be combined."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.algebra.methods import Recipe
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, check_fits


def find_misfits(
    path: str, numbers: Sequence[int], nodes: Sequence[Adapted], leaf: Any, recipe: Recipe
) -> list[str]:
    """Return how the nodes of one path differ from each other and from the base leaf.

    Args:
      path: the path.
      numbers: the numbers of the adapters that have these nodes.
      nodes: the nodes, without their base.
      leaf: the base leaf, or its shape; None if it is not known.
      recipe: the method and its options.
    """
    if leaf is not None:
        problems = [problem for node in nodes for problem in check_fits(path, node, leaf)]
        if problems:
            return problems
    described = [_describe(node) for node in nodes]
    for number, text in zip(numbers, described, strict=True):
        if text != described[0]:
            return [f"{path}: {described[0]} in adapters[{numbers[0]}], {text} in [{number}]"]
    ranks = [node.rank for node in nodes if isinstance(node, LoraWeight)]
    if recipe.method.sums == "factors" and len(set(ranks)) > 1:
        return [
            f"{path}: ranks {', '.join(map(str, ranks))}, and the method adds A to A and B to B; "
            'take "cat" or a method that ends in "svd", or resize the adapters to one rank'
        ]
    return []


def find_missing_base(
    path: str, nodes: Sequence[Adapted], weights: Any, recipe: Recipe
) -> list[str]:
    """Return why nodes cannot be combined without the values of the base leaf."""
    if isinstance(nodes[0], LoraWeight):
        if not is_dora(nodes) or recipe.method.sums != "updates":
            return []  # see `find_unfit_dora`
        return [f"{path}: DoRA changes the weight by its values; pass base=, the parameters"]
    if cancels_base(nodes, weights, recipe):
        return []
    what = "trained rows" if isinstance(nodes[0], TrainedRows) else "a fully trained leaf"
    mend = "pass base=, the parameters"
    if recipe.method.keeps == "all":
        mend += ", or weights that add up to 1"
    return [f"{path}: {what}, whose change is value - base; {mend}"]


def find_unfit_dora(path: str, nodes: Sequence[Adapted], weights: Any, recipe: Recipe) -> list[str]:
    """Return that a method does not take nodes with a magnitude."""
    if not is_dora(nodes) or recipe.method.sums == "updates" or stays(nodes, weights, recipe):
        return []
    return [
        f'{path}: DoRA, whose change is not scale·A·B; take a method that ends in "svd", with base='
    ]


def is_dora(nodes: Sequence[Adapted]) -> bool:
    """Return whether one of the nodes has a magnitude."""
    return any(isinstance(node, LoraWeight) and node.magnitude is not None for node in nodes)


def stays(nodes: Sequence[Adapted], weights: Any, recipe: Recipe) -> bool:
    """Return whether a weight with DoRA stays as it is: one adapter has it, and it counts once."""
    return is_dora(nodes) and len(nodes) == 1 and recipe.method.sums == "ranks" and _is_1(weights)


def cancels_base(nodes: Sequence[Any], weights: Any, recipe: Recipe) -> bool:
    """Return whether base + Σ wᵢ·(valueᵢ − base) is Σ wᵢ·valueᵢ."""
    first = nodes[0]
    if recipe.method.keeps != "all" or recipe.method.elects or not _is_1(weights):
        return False
    if any(getattr(node, "rows", None) != getattr(first, "rows", None) for node in nodes):
        return False
    scales = [node.scale for node in nodes]
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in scales):
        return False
    on = [np.asarray(x != 0) for x in scales]
    return all(x.shape == on[0].shape and (x == on[0]).all() for x in on) and bool(on[0].all())


def _is_1(weights: Any) -> bool:
    """Return whether the weights are known and add up to 1."""
    if isinstance(weights, jax.core.Tracer):
        return False
    return math.isclose(float(weights.sum()), 1, rel_tol=1e-6)


def _describe(node: Adapted) -> str:
    """Say what the nodes of one path must agree in."""
    if isinstance(node, LoraWeight):
        return f"factors of {node.shape} with layout {node.layout.axes!r}"
    if isinstance(node, TrainedLeaf):
        return f"a fully trained leaf {node.shape}"
    rows_axis = len(node.layout.positions("b"))
    others = (*node.value.shape[:rows_axis], *node.value.shape[rows_axis + 1 :])
    return f"trained rows along axis {node.axis}, {others} each"
