"""Which products of a program meet the same activation, found before it is walked."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.engine import jaxprs


class Sharing:
    """The products of adapted weights with one activation, in groups.

    `views` names the primitives that make a view of a weight. A weight's view may stand after the
    first product of its group; `producers` tells which equation to evaluate early.
    """

    def __init__(self, jaxpr: Any, is_weight: Sequence[bool], views: Callable[[str], bool]):
        weights = {v for v, known in zip(jaxpr.invars, is_weight, strict=True) if known}
        self.producers: dict[Any, int] = {}
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, eqn in enumerate(jaxpr.eqns):
            inputs = [atom for atom in eqn.invars if jaxprs.is_var(atom)]
            if eqn.primitive.name == "dot_general":
                activation = _activation(eqn, weights)
                if activation is not None:
                    groups[activation].append(i)
            elif inputs and views(eqn.primitive.name) and weights.issuperset(inputs):
                weights.update(eqn.outvars)
                self.producers |= dict.fromkeys(eqn.outvars, i)
        self.groups = {group[0]: tuple(group) for group in groups.values() if len(group) > 1}


def _activation(eqn: Any, weights: set[Any]) -> Any:
    """What tells products with one activation: the variable, its contracted axes, the precision."""
    sides = [jaxprs.is_var(atom) and atom in weights for atom in eqn.invars]
    contracted, batched = eqn.params["dimension_numbers"]
    if sum(sides) != 1 or any(batched):
        return None
    at = sides.index(False)
    if not jaxprs.is_var(eqn.invars[at]):
        return None
    return eqn.invars[at], tuple(contracted[at]), str(eqn.params["precision"])
