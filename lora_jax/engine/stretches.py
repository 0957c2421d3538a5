"""Stretches: equations in a row that touch no adapted weight, handed back to JAX as one function.

The equations of a traced program no longer belong to the functions of `jax.numpy` that made them.
JAX differentiates such a function once for all its calls, and a lone equation again each time,
which takes several times as long. A stretch is such a function again. Two are equal if they
compute the same on the same line, so that of the next layer, or of the next call, costs next to
nothing.
JAX inlines them: the program that it compiles is the same, with the same source lines and names.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.engine import jaxprs
from lora_jax.engine.lazy_weight import is_lazy
from lora_jax.engine.schedule import Step


class _Function:
    """What a stretch computes; equal to another one that computes the same on the same line.

    `operations` are equations, each with the numbers of the values that it reads (None for a
    literal): the function's arguments come first, then what each equation returns.
    """

    def __init__(
        self,
        operations: Sequence[tuple[Any, Sequence[int | None]]],
        outputs: Sequence[int],
        spelling: Any,
    ):
        self._operations = operations
        self._outputs = outputs
        self._spelling = spelling
        self._hash = hash(spelling)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self._spelling == other._spelling

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, *arrays: Any) -> list[Any]:
        values = list(arrays)
        for eqn, reads in self._operations:
            pairs = zip(reads, eqn.invars, strict=True)
            inputs = [a.val if i is None else values[i] for i, a in pairs]
            with jaxprs.line_context(eqn):
                values += jaxprs.bind(eqn, inputs)
        return [values[i] for i in self._outputs]


@functools.lru_cache(maxsize=4096)
def _jitted(function: _Function) -> Callable[..., list[Any]]:
    def stretch(*arrays: Any) -> list[Any]:
        return function(*arrays)

    return jax.jit(stretch, inline=True)


class Stretch(NamedTuple):
    """Equations in a row, of one line and one name scope of the user's program."""

    function: _Function
    inputs: Sequence[Any]  # variables
    outputs: Sequence[Any]  # variables that are read later
    length: int  # in steps

    @classmethod
    def at(
        cls,
        steps: Sequence[tuple[Step, Sequence[Any]]],
        start: int,
        env: Mapping[Any, Any],
        stands_alone: Callable[[Any], bool],
    ) -> "Stretch | None":
        """Return the longest stretch from a step on; None if that step cannot be in one.

        Args:
          steps: those of the program, each with the variables that no later one reads.
          start: the number of the first step.
          env: the values so far, by variable.
          stands_alone: whether an equation is in none.
        """
        found = _following(steps, start, env, stands_alone)
        if not found:
            return None
        made = [v for eqn, _ in found for v in eqn.outvars]
        read = dict.fromkeys(v for eqn, _ in found for v in eqn.invars if jaxprs.is_var(v))
        inputs = [v for v in read if v in env]
        number: dict[Any, int] = {v: i for i, v in enumerate([*inputs, *made])}
        unread = {v for _, gone in steps[start : start + len(found)] for v in gone}
        outputs = [v for v in made if v not in unread]
        reads = [
            tuple(number[v] if jaxprs.is_var(v) else None for v in eqn.invars) for eqn, _ in found
        ]
        operations = [(eqn, i) for (eqn, _), i in zip(found, reads, strict=True)]
        returned = tuple(number[v] for v in outputs)
        line = _line(found[0][0])
        spelling = (line, len(inputs), returned, *reads, *(spelled for _, spelled in found))
        return cls(_Function(operations, returned, spelling), inputs, outputs, len(found))

    def run(self, env: Mapping[Any, Any]) -> list[Any]:
        """Return the outputs."""
        return _jitted(self.function)(*(env[v] for v in self.inputs))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on other inputs, as a stretch where JAX differentiates or maps it."""
    spelled = spelling(eqn) if jaxprs.are_transformed(values) else None
    if spelled is None:
        return jaxprs.bind(eqn, values)
    n = len(values)
    outputs = range(n, n + len(eqn.outvars))
    return _jitted(_Function([(eqn, range(n))], outputs, (n, spelled)))(*values)


def spelling(eqn: Any) -> Any:
    """Return what an equation computes and on which line, for comparison; None if nothing tells."""
    spelled = _spelling(eqn)
    return None if spelled is None else (_line(eqn), spelled)


def _following(
    steps: Sequence[tuple[Step, Sequence[Any]]],
    start: int,
    env: Mapping[Any, Any],
    stands_alone: Callable[[Any], bool],
) -> list[tuple[Any, Any]]:
    """Return the equations of a stretch, each with its spelling."""
    found: list[tuple[Any, Any]] = []
    first = steps[start][0].eqns[0]
    for step, _ in steps[start:]:
        eqn = step.eqns[0]
        if step.is_group or any(jaxprs.is_var(v) and is_lazy(env.get(v)) for v in eqn.invars):
            break
        if stands_alone(eqn) or (eqn is not first and not _in_one_place(first, eqn)):
            break
        spelled = _spelling(eqn)
        if spelled is None:
            break
        found.append((eqn, spelled))
    return found


def _in_one_place(eqn: Any, other: Any) -> bool:
    """Return whether two equations have one line, one name scope and the same settings."""
    one, two = eqn.source_info, other.source_info
    if eqn.ctx is not other.ctx or one.name_stack != two.name_stack:
        return False
    return one.traceback is two.traceback or _line(eqn) == _line(other)


def _line(eqn: Any) -> str:
    """Return the user's line, without the column."""
    return re.sub(r":(\d+):\d+ \(", r":\1 (", jaxprs.source_line(eqn))


def _spelling(eqn: Any) -> Any:
    """Return what an equation computes, for comparison; None where that cannot be told.

    It cannot where functions or programs are among its parameters. JAX differentiates those that
    it has seen once as they are.
    """
    if eqn.effects:
        return None
    parts = [eqn.primitive]
    for name, value in eqn.params.items():
        if callable(value) or hasattr(jaxprs.open_jaxpr(value)[0], "eqns"):
            return None
        parts.append((name, _exact(value)))
    for atom in eqn.invars:
        if not jaxprs.is_var(atom):
            literal = np.asarray(atom.val)
            if literal.ndim:
                return None
            parts.append((atom.aval, type(atom.val), literal.tobytes()))
    spelled = tuple(parts)
    try:
        hash(spelled)
    except TypeError:
        return None
    return spelled


def _exact(value: Any) -> Any:
    """Return a parameter for comparison that tells 0.0 from -0.0, and 1 from True."""
    kind = type(value)
    if kind in (tuple, list):
        return (kind, *map(_exact, value))
    return kind, repr(value) if kind is float else value
