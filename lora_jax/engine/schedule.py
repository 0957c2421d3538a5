"""The order in which a program's equations run, with products of one activation side by side."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.engine import jaxprs


class Step(NamedTuple):
    """An equation to evaluate; or several products of one activation, to prepare together."""

    eqns: tuple[Any, ...]
    is_group: bool


def schedule(
    jaxpr: Any, weights: Collection[Any], is_view: Callable[[str], bool]
) -> list[tuple[Step, list[Any]]]:
    """Return the steps that evaluate `jaxpr`, each with the variables that no later one reads.

    Every equation is a step. Products of several weights with one activation also form a group,
    which is another step, before the first of them; the views that make the other weights (a
    transpose, a slice) move before the group. Everything else keeps its order.

    Args:
      jaxpr: the program.
      weights: which of its inputs are adapted weights.
      is_view: whether a primitive, by its name, makes a view of a weight.
    """
    groups, views = _groups(jaxpr, weights, is_view)
    steps: list[Step] = []
    done: set[int] = set()

    def add_views_before(i: int) -> None:
        for atom in jaxpr.eqns[i].invars:
            if jaxprs.is_var(atom) and atom in views:
                add(views[atom])

    def add(i: int) -> None:
        if i not in done:
            add_views_before(i)
            done.add(i)
            steps.append(Step((jaxpr.eqns[i],), is_group=False))

    for i in range(len(jaxpr.eqns)):
        for j in groups.get(i, ()):
            add_views_before(j)
        if i in groups:
            steps.append(Step(tuple(jaxpr.eqns[j] for j in groups[i]), is_group=True))
        add(i)
    return list(zip(steps, _last_reads(steps, jaxpr.outvars), strict=True))


def _groups(
    jaxpr: Any, inputs: Collection[Any], is_view: Callable[[str], bool]
) -> tuple[Mapping[int, Sequence[int]], Mapping[Any, int]]:
    """Find the products of weights that share an activation, and the equations that make views.

    By index: {first product of a group: all of the group}, {variable of a view: its equation}.
    """
    weights = {*inputs}
    views: dict[Any, int] = {}
    products: dict[Any, list[int]] = defaultdict(list)
    for i, eqn in enumerate(jaxpr.eqns):
        variables = [atom for atom in eqn.invars if jaxprs.is_var(atom)]
        if eqn.primitive.name == "dot_general":
            activation = _activation(eqn, weights)
            if activation is not None:
                products[activation].append(i)
        elif variables and is_view(eqn.primitive.name) and weights.issuperset(variables):
            weights.update(eqn.outvars)
            views |= dict.fromkeys(eqn.outvars, i)
    return {group[0]: group for group in products.values() if len(group) > 1}, views


def _activation(eqn: Any, weights: Collection[Any]) -> Any:
    """Return what products with one activation have in common; None for any other product.

    That is the variable, its contracted axes and the precision.
    """
    sides = [jaxprs.is_var(atom) and atom in weights for atom in eqn.invars]
    contracted, batched = eqn.params["dimension_numbers"]
    if sum(sides) != 1 or any(batched):
        return None
    at = sides.index(False)
    if not jaxprs.is_var(eqn.invars[at]):
        return None
    return eqn.invars[at], tuple(contracted[at]), str(eqn.params["precision"])


def _last_reads(steps: Sequence[Step], outvars: Sequence[Any]) -> list[list[Any]]:
    """Return per step the variables that it reads and no later step does, outputs left out."""
    found, read = [], {v for v in outvars if jaxprs.is_var(v)}
    for step in reversed(steps):
        here = {v for eqn in step.eqns for v in eqn.invars if jaxprs.is_var(v)}
        made = () if step.is_group else step.eqns[0].outvars
        found.append([*(here - read), *(v for v in made if v not in read)])
        read |= here
    return found[::-1]
