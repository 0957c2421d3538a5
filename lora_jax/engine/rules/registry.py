"""What a rule is, and how it gets into a table by the names of its primitives.

A rule is called with the context, the equation and its inputs, of which at least one is a
`LazyWeight`; it returns the outputs, or `NotImplemented` where the weight must become dense.
The rule of an equation that holds programs, a container, also gets `walk(jaxpr, consts, args)`,
which interprets one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lora_jax.engine.context import Context

PrimitiveRule = Callable[[Context, Any, Sequence[Any]], Any]
Walk = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]
Container = Callable[[Context, Any, Sequence[Any], Walk], Any]

F = TypeVar("F", bound=Callable)


def rule(table: dict[str, F], *primitives: str) -> Callable[[F], F]:
    """Put a function into `table` under the names of these primitives."""

    def register(fn: F) -> F:
        table.update(dict.fromkeys(primitives, fn))
        return fn

    return register
