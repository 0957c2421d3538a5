"""`custom_linear_solve`, rebuilt around lazy weights: its derivative is that of the solution."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import is_lazy
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "custom_linear_solve")
def _linear_solve(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Interpret the product and both solvers; JAX transposes the product itself."""
    programs, values = eqn.params["jaxprs"], iter(args)
    consts = [list(itertools.islice(values, n)) for n in eqn.params["const_lengths"]]
    b = [ctx.densify(x, eqn) if is_lazy(x) else x for x in values]

    def run(program: Any, consts: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]]:
        jaxpr, jaxpr_consts = jaxprs.open_jaxpr(program)

        def call(x: Sequence[Any]) -> list[Any]:
            outs = walk(jaxpr, jaxpr_consts, [*consts, *x])
            return [ctx.densify(out, eqn) if is_lazy(out) else out for out in outs]

        return call

    # matvec, vecmat, solve and transpose_solve; the last is None where the program has none
    calls: list[Any] = [
        None if program is None else run(program, own)
        for program, own in zip(programs, consts, strict=True)
    ]
    product, _, solve, transpose_solve = calls
    has_aux = len(eqn.outvars) > len(b)

    def solver(call: Any) -> Any:
        def solve(_: Any, b: Sequence[Any]) -> Any:
            outs = call(b)
            return (outs[: len(b)], outs[len(b) :]) if has_aux else outs

        return None if call is None else solve

    outs: Any = lax.custom_linear_solve(
        product, b, solver(solve), solver(transpose_solve), has_aux=has_aux
    )
    return [*outs[0], *outs[1]] if has_aux else outs
