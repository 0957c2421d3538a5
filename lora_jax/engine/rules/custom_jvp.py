"""`custom_jvp`: the user-defined JVP rule runs on lazy weights, which stay lazy."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes
from jax.custom_derivatives import SymbolicZero

from lora_jax.engine import jaxprs
from lora_jax.engine.arithmetic import to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import is_lazy, tangents
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "custom_jvp_call")
def _custom_jvp(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Interpret the user-defined rule as we do the function: a weight's tangent is lazy too."""
    jaxpr, consts = jaxprs.open_jaxpr(eqn.params["call_jaxpr"])
    if any(is_lazy(x) and x.probe for x in args):
        return walk(jaxpr, consts, args)  # the user-defined derivative would not reach the probe
    n_consts = eqn.params["num_consts"]
    args = [without_moving_base(ctx, eqn, ctx.densify_gain(x, eqn)) for x in args]

    @jax.custom_jvp
    def call(*args: Any) -> list[Any]:
        return [ctx.densify(x, eqn) if is_lazy(x) else x for x in walk(jaxpr, consts, args)]

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        # The rule is linear in the tangents, and that of a weight is a sum: apply it term by term.
        pairs = list(zip(primals, tangents, strict=True))[n_consts:]
        terms = [_terms(p, t) for p, t in pairs]
        out, total = _apply_rule(ctx, eqn, walk, primals[n_consts:], [t for t, _ in terms])
        others = [[t for _, t in terms]]
        if any(_base_moves(p, t) for p, t in pairs):
            others.append([t.w if _base_moves(p, t) else _zero(p) for p, t in pairs])
        for tangents in others:
            _, more = _apply_rule(ctx, eqn, walk, primals[n_consts:], tangents)
            total = [_plus(a, b) for a, b in zip(total, more, strict=True)]
        return out, total

    call.defjvp(derivative, symbolic_zeros=True)
    return call(*args)


def _apply_rule(
    ctx: Context, eqn: Any, walk: Walk, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Apply the rule to one term of the tangents; return the outputs and their tangents."""
    if not eqn.params["symbolic_zeros"]:
        tangents = [instantiate(t) for t in tangents]
    zeros_in = [type(t) is SymbolicZero for t in tangents]
    jaxpr, consts, first, zeros_out = jaxprs.jvp_rule(eqn, zeros_in)
    nonzero = [t for t, zero in zip(tangents, zeros_in, strict=True) if not zero]
    with ctx.inside_derivative():
        outs = walk(jaxpr, consts, [*first, *primals, *nonzero])
    outs = [ctx.densify(x, eqn) if is_lazy(x) else x for x in outs]
    out, dots = outs[: len(zeros_out)], iter(outs[len(zeros_out) :])
    return out, [_zero(o) if zero else next(dots) for o, zero in zip(out, zeros_out, strict=True)]


def _plus(a: Any, b: Any) -> Any:
    if type(a) is SymbolicZero or type(b) is SymbolicZero:
        return b if type(a) is SymbolicZero else a
    return a if a.dtype == dtypes.float0 else a + b


def _zero(x: Any) -> SymbolicZero:
    if is_lazy(x):
        x = to_dense(x) if x.w is None else x.w
    aval = x.aval if isinstance(x, QuantizedView) else jax.typeof(x)
    return SymbolicZero(aval.to_tangent_aval())


def _base_moves(primal: Any, t: Any) -> bool:
    """Return whether a weight's base has a tangent, as it does where an input scales it."""
    if not is_lazy(primal) or isinstance(primal.w, QuantizedView):
        return False
    return t.w is not None and type(t.w) is not SymbolicZero


def without_moving_base(ctx: Context, eqn: Any, x: Any) -> Any:
    """Return `x`, dequantized where an input scales it: its base may have a gradient then."""
    if is_lazy(x) and isinstance(x.w, QuantizedView) and x.w.may_have_gradient:
        return ctx.dequantize(x, eqn, " (an input scales it)")
    return x


def instantiate(t: Any) -> Any:
    """Return a tangent or cotangent as an array."""
    if type(t) is not SymbolicZero:
        return t
    # jax.numpy does not know float0, the tangent dtype of integers and keys
    return np.zeros(t.shape, t.dtype) if t.dtype == dtypes.float0 else jaxprs.zeros(t.aval)


def _terms(primal: Any, t: Any) -> tuple[Any, Any]:
    """Split an argument's tangent in two: the terms of A and of B, or for an array itself and 0."""
    if is_lazy(primal) and primal.a is not None:
        return tangents(primal, instantiate(t.a), instantiate(t.b))
    return _zero(primal) if is_lazy(primal) else t, _zero(primal)
