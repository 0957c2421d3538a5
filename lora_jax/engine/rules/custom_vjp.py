"""`custom_vjp`: the user-defined derivative runs on lazy weights, and yields dA and dB."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from lora_jax.engine import jaxprs
from lora_jax.engine.arithmetic import to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.jaxprs import JaxprAndConsts
from lora_jax.engine.lazy_weight import LazyWeight, is_lazy
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.custom_jvp import instantiate, without_moving_base
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


#: What may happen to the product that is dW before it is returned.
_LINEAR = ("transpose", "reshape", "squeeze", "convert_element_type", "neg", "copy", "copy_p")


@rule(CONTAINERS, "custom_vjp_call")
def _custom_vjp(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Interpret both halves of the user-defined derivative as we do the function.

    What the first half saves stays lazy. The second one yields the cotangent dW of the whole
    weight, from which dA = dW·Bᵀ and dB = Aᵀ·dW follow (the scale is in B). Where dW is a product,
    such as xᵀ·g, it is multiplied with B and A factor by factor and never materialized.
    """
    jaxpr, consts = jaxprs.open_jaxpr(eqn.params["call_jaxpr"])
    # The user-defined derivative does not know about dropout in the branch.
    args = [without_moving_base(ctx, eqn, ctx.densify_gain(x, eqn)) for x in args]
    args = [_switch_dropout_off(x) if is_lazy(x) else x for x in args]

    def dense(outs: Sequence[Any]) -> list[Any]:
        return [ctx.densify(x, eqn) if is_lazy(x) else x for x in outs]

    def primal(*args: Any) -> list[Any]:
        return dense(walk(jaxpr, consts, args))

    def forward(*args: Any) -> tuple[list[Any], Any]:
        moving = [any(x.perturbed for x in jax.tree.leaves(arg)) for arg in args]
        bases = [is_lazy(arg) and _base_moves(arg.w) for arg in args]
        args = jax.tree.map(lambda x: x.value, args)
        first, second = _split_derivative(eqn, moving)
        outs = walk(*first, args)
        factors = [dataclasses.replace(x, w=None) if is_lazy(x) else None for x in args]
        pullback = _Pullback(second, moving, [x is not None for x in factors], bases)
        for lazy in pullback.whole(factors):
            ctx.densify(lazy, eqn, " (the custom derivative forms all of dW)")
        n_out = len(eqn.outvars)
        return dense(outs[:n_out]), (pullback, outs[n_out:], factors)

    def backward(saved: Any, cotangents: Sequence[Any]) -> list[Any]:
        pullback, residuals, factors = saved
        given = [instantiate(ct) for ct in cotangents]
        given = [ct for ct in given if ct.dtype != dtypes.float0]
        program: JaxprAndConsts = pullback.program
        outs = dense(walk(*program, [*residuals, *given]))
        return pullback.cotangents(outs, factors, walk)

    if ctx.infers or any(is_lazy(x) and x.probe for x in args):
        return primal(*args)  # the user-defined derivative would not reach the probe
    call = jax.custom_vjp(primal)
    call.defvjp(forward, lambda *args: tuple(backward(*args)), symbolic_zeros=True)
    return call(*args)


def _base_moves(w: Any) -> bool:
    return w is not None and not isinstance(w, QuantizedView) and w.perturbed


def _switch_dropout_off(lazy: LazyWeight) -> LazyWeight:
    return dataclasses.replace(lazy, key=None, key_axes=(), dropout=0.0)


def _split_derivative(eqn: Any, moving: Sequence[bool]) -> tuple[JaxprAndConsts, JaxprAndConsts]:
    """Trace the user-defined derivative as two programs.

    The first takes the equation's inputs; it returns the outputs, then what is saved. The second
    takes what was saved, then the cotangents of the floating outputs; it returns the cotangents of
    those inputs that are `moving`.
    """
    is_float = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars]
    trees: list[Any] = []

    def first(*args: Any) -> list[Any]:
        def call(*moved: Any) -> list[Any]:
            values = iter(moved)
            merged = [next(values) if m else x for x, m in zip(args, moving, strict=True)]
            return jaxprs.bind(eqn, merged)

        outs, pullback = jax.vjp(call, *(x for x, m in zip(args, moving, strict=True) if m))
        saved, tree = jax.tree.flatten(pullback)
        trees.append(tree)
        return [*outs, *saved]

    def second(*values: Any) -> list[Any]:
        saved, given = values[: trees[0].num_leaves], iter(values[trees[0].num_leaves :])
        cotangents = [
            next(given) if floats else np.zeros(v.aval.shape, dtypes.float0)
            for v, floats in zip(eqn.outvars, is_float, strict=True)
        ]
        return jax.tree.unflatten(trees[0], saved)(cotangents)

    traced = jaxprs.trace(first, *(v.aval for v in eqn.invars))
    saved = [v.aval for v in traced[0].outvars[len(eqn.outvars) :]]
    given = [v.aval for v, floats in zip(eqn.outvars, is_float, strict=True) if floats]
    return traced, jaxprs.trace(second, *saved, *given)


@dataclasses.dataclass(frozen=True, eq=False)
class _WeightCotangent:
    """dW = `tail(left · right)`; `transposed` maps (right, A·B) to what is contracted with left."""

    left: Any
    right: Any
    transposed: JaxprAndConsts


@jax.tree_util.register_static
class _Pullback:
    """The second half; where dW is a product, it returns the two operands in place of dW."""

    def __init__(
        self,
        half: JaxprAndConsts,
        moving: Sequence[bool],
        lazy: Sequence[bool],
        bases: Sequence[bool],
    ):
        jaxpr, consts = half
        outs = iter(jaxpr.outvars)
        found = [next(outs) if moves else None for moves in moving]
        made = jaxprs.producers(jaxpr)
        # A base that has a cotangent itself, as where an input scales it, needs all of dW.
        self._products = [
            _find_product(made, v) if is_weight and v is not None and not moves else None
            for v, is_weight, moves in zip(found, lazy, bases, strict=True)
        ]
        self._bases = bases
        self._moving = moving
        wanted: list[Any] = []
        for v, product in zip(found, self._products, strict=True):
            wanted += [product.left, product.right] if product else [] if v is None else [v]
        self.program: JaxprAndConsts = jaxprs.restrict_to(jaxpr, consts, wanted)

    def whole(self, factors: Sequence[Any]) -> list[LazyWeight]:
        """Return the weights whose dW is materialized."""
        rows = zip(factors, self._products, self._moving, strict=True)
        return [lazy for lazy, product, moves in rows if lazy and moves and not product]

    def cotangents(self, outs: Sequence[Any], factors: Sequence[Any], walk: Walk) -> list[Any]:
        """Return the cotangent of each input from the program's outputs: array, weight or None."""
        values = iter(outs)
        rows = zip(factors, self._products, self._moving, self._bases, strict=True)
        return [
            _one_cotangent(lazy, product, values, walk, base) if moves else None
            for lazy, product, moves, base in rows
        ]


def _one_cotangent(
    lazy: Any, product: _WeightCotangent | None, values: Any, walk: Walk, base_moves: bool
) -> Any:
    first = next(values)
    if lazy is None:
        return first
    if product is None:
        pulled = _pull_back(lazy, to_dense, first)
        return dataclasses.replace(pulled, w=first.astype(lazy.dtype)) if base_moves else pulled
    right = next(values)
    return _pull_back(lazy, lambda update: walk(*product.transposed, [right, update])[0], first)


def _pull_back(lazy: LazyWeight, fn: Callable[[LazyWeight], Any], ct: jax.Array) -> LazyWeight:
    """Return the cotangents of both factors, from that of `fn(A·B)`."""

    def of_factors(a: jax.Array, b: jax.Array) -> jax.Array:
        return fn(dataclasses.replace(lazy, a=a, b=b))

    out, pullback = jax.vjp(of_factors, lazy.a, lazy.b)
    a, b = pullback(ct.astype(out.dtype))
    return dataclasses.replace(lazy, a=a, b=b)


def _find_product(made: dict[Any, Any], var: Any) -> _WeightCotangent | None:
    """Return how `var` comes from a product of two variables; None if it does not."""
    aval, tail = var.aval, []
    while (eqn := made.get(var)) is not None and eqn.primitive.name != "dot_general":
        inputs = [v for v in eqn.invars if jaxprs.is_var(v)]
        scales = eqn.primitive.name == "mul" and len(inputs) == 1
        if not scales and eqn.primitive.name not in _LINEAR:
            return None
        tail.append(eqn)
        (var,) = inputs
    if eqn is None or not all(map(jaxprs.is_var, eqn.invars)):
        return None
    left, right = eqn.invars

    def product(x: Any, y: Any) -> Any:
        (out,) = jaxprs.bind(eqn, [x, y])
        for step in reversed(tail):
            values = [out if jaxprs.is_var(v) else v.val for v in step.invars]
            (out,) = jaxprs.bind(step, values)
        return out

    def transposed(y: Any, update: Any) -> Any:
        return jax.linear_transpose(lambda x: product(x, y), left.aval)(update)

    return _WeightCotangent(left, right, jaxprs.trace(transposed, right.aval, aval))
