"""Reading transformed programs: which arrays have a weight's size."""

from collections import Counter
from collections.abc import Iterator

import jax


def squeezed(shape):
    return tuple(sorted(size for size in shape if size != 1))


def equations(jaxpr) -> Iterator:
    """Yield every equation of a program and of the programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def weight_sized(jaxpr, shapes) -> Counter:
    """Count the outputs of equations with all axes of a weight, in any order, or more."""
    found: Counter = Counter()
    for eqn in equations(jaxpr):
        # Gradients stop at the base: `stop_gradient` is the weight itself, not a copy of it. What
        # `jit` returns is made by an equation in it, which counts.
        if eqn.primitive.name not in ("stop_gradient", "jit"):
            made = [Counter(var.aval.shape) for var in eqn.outvars]
            found.update(shape for shape in shapes for axes in made if Counter(shape) <= axes)
    return found
