"""Functions with a forward derivative of their author's (custom_jvp), rebuilt around weights."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes
from jax.custom_derivatives import SymbolicZero

from lora_jax import _jaxpr
from lora_jax.context import Context
from lora_jax.lazy import is_lazy, tangents
from lora_jax.rules import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "custom_jvp_call")
def _custom_jvp(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """The author's rule, interpreted like the function: the tangent of a weight is lazy too."""
    jaxpr, consts = _jaxpr.open_jaxpr(eqn.params["call_jaxpr"])
    n_consts = eqn.params["num_consts"]

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return [ctx.make_dense(x, eqn) if is_lazy(x) else x for x in walk(jaxpr, consts, args)]

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        # The rule is linear in the tangents, and a weight's is a sum of two: so is the outcome.
        terms = [_terms(p, t) for p, t in zip(primals, tangents, strict=True)][n_consts:]
        out, first = _apply_rule(ctx, eqn, walk, primals[n_consts:], [t for t, _ in terms])
        _, second = _apply_rule(ctx, eqn, walk, primals[n_consts:], [t for _, t in terms])
        return out, [_plus(a, b) for a, b in zip(first, second, strict=True)]

    call.defjvp(derivative, symbolic_zeros=True)
    return call(*args)


def _apply_rule(
    ctx: Context, eqn: Any, walk: Walk, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The author's rule on one term of the tangents: the outputs and their tangents."""
    if not eqn.params["symbolic_zeros"]:
        tangents = [instantiate(t) for t in tangents]
    zeros_in = [type(t) is SymbolicZero for t in tangents]
    jaxpr, consts, first, zeros_out = _jaxpr.jvp_rule(eqn, zeros_in)
    nonzero = [t for t, zero in zip(tangents, zeros_in, strict=True) if not zero]
    outs = walk(jaxpr, consts, [*first, *primals, *nonzero])
    outs = [ctx.make_dense(x, eqn) if is_lazy(x) else x for x in outs]
    out, dots = outs[: len(zeros_out)], iter(outs[len(zeros_out) :])
    return out, [_zero(o) if zero else next(dots) for o, zero in zip(out, zeros_out, strict=True)]


def _plus(a: Any, b: Any) -> Any:
    if type(a) is SymbolicZero or type(b) is SymbolicZero:
        return b if type(a) is SymbolicZero else a
    return a if a.dtype == dtypes.float0 else a + b


def _zero(x: Any) -> SymbolicZero:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


def instantiate(t: Any) -> Any:
    """A tangent or cotangent as an array of numbers."""
    if type(t) is not SymbolicZero:
        return t
    # float0, the tangent dtype of integers and keys, is no dtype of jax.numpy
    module = np if t.dtype == dtypes.float0 else jax.numpy
    return module.zeros(t.shape, t.dtype)


def _terms(primal: Any, t: Any) -> tuple[Any, Any]:
    """The two terms of one argument's tangent; that of an ordinary argument is all in the first."""
    if is_lazy(primal) and primal.a is not None:
        return tangents(primal, instantiate(t.a), instantiate(t.b))
    if is_lazy(primal):
        return _zero(primal.w), _zero(primal.w)
    return t, _zero(primal)
