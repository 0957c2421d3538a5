"""What a rule is, and how to put one into a table.

A rule gets the context, the equation and its inputs, at least one of which is a `LazyWeight`. It
returns the outputs, or `NotImplemented` where the weight must be materialized. The rule of a
container, an equation that contains programs, also gets `walk(jaxpr, consts, args)`, which
interprets one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lora_jax.engine.context import Context

PrimitiveRule = Callable[[Context, Any, Sequence[Any]], Any]
Walk = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]
Container = Callable[[Context, Any, Sequence[Any], Walk], Any]

F = TypeVar("F", bound=Callable)


def rule(table: dict[str, F], *primitives: str) -> Callable[[F], F]:
    """Put the decorated function into `table` under the names of these primitives."""

    def register(fn: F) -> F:
        table.update(dict.fromkeys(primitives, fn))
        return fn

    return register
