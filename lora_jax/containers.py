"""Equations that hold programs (jit, scan, while, cond, remat, custom_jvp), rebuilt around weights.

Each is called with the context, the equation, its inputs and `walk(jaxpr, consts, args)`, which
interprets a program; a `LazyWeight` is a pytree, so it passes through JAX's own control flow.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import dtypes, lax
from jax.custom_derivatives import SymbolicZero

from lora_jax import _contract, _jaxpr
from lora_jax.context import Context
from lora_jax.lazy import MEMBERS, LazyWeight, is_lazy, tangents
from lora_jax.rules import rule

Walk = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]
Container = Callable[[Context, Any, Sequence[Any], Walk], Any]
CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "jit", "pjit", "closed_call", "core_call")
def _jit(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """One jitted function per inner program, so that what JAX traced once stays traced once."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    jaxpr, consts = _jaxpr.open_jaxpr(inner)
    shardings_in, shardings_out = _jaxpr.shardings(eqn)
    if any(shardings_in) or any(shardings_out):

        def sharded(*args: Any) -> list[Any]:
            outs = walk(jaxpr, consts, args)
            pairs = zip(outs, shardings_out, strict=True)
            return [ctx.make_dense(x, eqn) if is_lazy(x) and s else x for x, s in pairs]

        where = tuple(_placed(x, s) for x, s in zip(args, shardings_in, strict=True))
        return jax.jit(sharded, in_shardings=where, out_shardings=list(shardings_out))(*args)
    if id(inner) not in ctx.jitted:

        def call(*args: Any) -> list[Any]:
            return walk(jaxpr, consts, args)

        call.__name__ = call.__qualname__ = eqn.params.get("name", "call")
        ctx.jitted[id(inner)] = jax.jit(call), inner  # holding `inner`, whose id must stay its own
    return ctx.jitted[id(inner)][0](*args)


def _placed(x: Any, sharding: Any) -> Any:
    """The sharding of one argument; a weight's factors go wherever the compiler puts them."""
    if sharding is None or not is_lazy(x):
        return sharding
    return dataclasses.replace(
        x, w=None if x.w is None else sharding, **{name: None for name, _ in MEMBERS}
    )


@rule(CONTAINERS, "remat2", "remat", "checkpoint")
def _remat(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    params = eqn.params
    jaxpr, consts = _jaxpr.open_jaxpr(params["jaxpr"])
    if params["differentiated"] and params["prevent_cse"]:
        # This is the recomputation in a backward pass: without the barrier, which JAX adds when it
        # lowers the equation, the compiler would merge it with the forward pass again.
        args = lax.optimization_barrier(list(args))

    def call(*args: Any) -> list[Any]:
        return walk(jaxpr, consts, args)

    call = jax.checkpoint(call, policy=params["policy"], prevent_cse=params["prevent_cse"])
    return call(*args)


@rule(CONTAINERS, "optimization_barrier")
def _optimization_barrier(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    return lax.optimization_barrier(list(args))


@rule(CONTAINERS, "scan")
def _scan(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Weights among `xs` stay `xs`: the factors that have the scanned axis are scanned with them.

    Closing over stacked weights and indexing them would copy each of them.
    """
    params = eqn.params
    jaxpr, jaxpr_consts = _jaxpr.open_jaxpr(params["jaxpr"])
    n_consts, n_carry = _jaxpr.scan_counts(eqn)
    consts = list(args[:n_consts])
    carried = args[n_consts : n_consts + n_carry]
    loop = _Carry(ctx, eqn, jaxpr, carried, offset=n_consts)
    scanned = [_Scanned(x) if is_lazy(x) else None for x in args[n_consts + n_carry :]]
    xs = [
        x if s is None else s.xs for x, s in zip(args[n_consts + n_carry :], scanned, strict=True)
    ]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        items = [x if s is None else s.inside(x) for x, s in zip(slices, scanned, strict=True)]
        outs = walk(jaxpr, jaxpr_consts, [*consts, *loop.all(carry), *items])
        return loop.moving(outs[:n_carry]), outs[n_carry:]

    carry, ys = lax.scan(
        body,
        loop.start,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return loop.all(carry) + [_stacked(y, params["length"]) if is_lazy(y) else y for y in ys]


class _Scanned:
    """A lazy weight among the `xs` of a scan: what is sliced, and how a slice is a weight again."""

    def __init__(self, lazy: LazyWeight):
        lead = lazy.axes[0]
        self.xs: dict[str, Any] = {} if lazy.w is None else {"w": lazy.w}
        static: dict[str, Any] = {"axes": lazy.axes[1:], "shape": lazy.shape[1:]}
        for name, axes in MEMBERS:
            if lead in getattr(lazy, axes):
                moved, names = _contract.move_first(getattr(lazy, name), getattr(lazy, axes), lead)
                self.xs[name] = moved
                static[axes] = tuple(names[1:])
        indexed = tuple(sorted({*lazy.indexed, *lead.origins}))
        self._template = dataclasses.replace(lazy, indexed=indexed, **static)

    def inside(self, slices: dict[str, Any]) -> LazyWeight:
        """The weight of one step."""
        return dataclasses.replace(self._template, **slices)


def _stacked(lazy: LazyWeight, length: int) -> LazyWeight:
    """A weight that came out of a scan step by step: every member has gained a leading axis."""
    lead = lazy.new_axis()
    changes: dict[str, Any] = {"axes": (lead, *lazy.axes), "shape": (length, *lazy.shape)}
    for name, axes in MEMBERS:
        if getattr(lazy, name) is not None:
            changes[axes] = (lead, *getattr(lazy, axes))
    return dataclasses.replace(lazy, **changes)


class _Carry:
    """The carry of a loop: weights that the body hands on untouched stay out of it, and lazy."""

    def __init__(self, ctx: Context, eqn: Any, body: Any, init: Sequence[Any], offset: int):
        self._ctx, self._eqn = ctx, eqn
        ins, outs = body.invars[offset : offset + len(init)], body.outvars[: len(init)]
        self._fixed = [
            x if is_lazy(x) and i is o else None for x, i, o in zip(init, ins, outs, strict=True)
        ]
        self.start = [
            ctx.make_dense(x, eqn, " (the loop changes it)") if is_lazy(x) else x
            for x, fixed in zip(init, self._fixed, strict=True)
            if fixed is None
        ]

    def all(self, moving: Sequence[Any]) -> list[Any]:
        """Every carried value, from those that move."""
        values = iter(moving)
        return [next(values) if fixed is None else fixed for fixed in self._fixed]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        """The values that move, none of them lazy, from every carried value."""
        return [
            self._ctx.make_dense(x, self._eqn, " (the loop changes it)") if is_lazy(x) else x
            for x, fixed in zip(values, self._fixed, strict=True)
            if fixed is None
        ]


@rule(CONTAINERS, "while")
def _while(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    params = eqn.params
    cond, cond_consts = _jaxpr.open_jaxpr(params["cond_jaxpr"])
    body, body_consts = _jaxpr.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = list(args[:n_cond]), list(args[n_cond : n_cond + n_body])
    loop = _Carry(ctx, eqn, body, args[n_cond + n_body :], offset=n_body)

    def goes_on(carry: Sequence[Any]) -> Any:
        return walk(cond, cond_consts, [*for_cond, *loop.all(carry)])[0]

    def body_fn(carry: Sequence[Any]) -> Sequence[Any]:
        moved = loop.moving(walk(body, body_consts, [*for_body, *loop.all(carry)]))
        if not cond.outvars[0].aval.shape:
            return moved
        # Under vmap each example has a condition of its own: those that are done stand still.
        going = goes_on(carry)
        return [_where(going, new, old) for new, old in zip(moved, carry, strict=True)]

    return loop.all(lax.while_loop(lambda carry: goes_on(carry).any(), body_fn, loop.start))


def _where(going: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` for the examples that go on; their axes lead."""
    chosen = lax.broadcast_in_dim(going, new.shape, range(going.ndim))
    return lax.select(chosen, new, old)


@rule(CONTAINERS, "cond")
def _cond(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> Any:
    index, *operands = args
    if is_lazy(index):
        return NotImplemented
    branches = [_jaxpr.open_jaxpr(branch) for branch in eqn.params["branches"]]
    if eqn.params.get("branches_platforms") is not None:
        # One branch a platform: another's must not be lowered, and the default one tells the use.
        return walk(*branches[-1], operands) if ctx.infers else NotImplemented

    def passed_on(position: int) -> Any:
        """The weight that every branch hands on as this output, if there is one."""
        sources = {
            jaxpr.invars.index(jaxpr.outvars[position])
            if jaxpr.outvars[position] in jaxpr.invars
            else None
            for jaxpr, _ in branches
        }
        source = sources.pop()
        lazy = None if sources or source is None else operands[source]
        return lazy if is_lazy(lazy) else None

    fixed = [passed_on(i) for i in range(len(eqn.outvars))]

    def branch(jaxpr: Any, consts: Sequence[Any]) -> Callable[..., list[Any]]:
        def call(*operands: Any) -> list[Any]:
            outs = walk(jaxpr, consts, operands)
            return [
                ctx.make_dense(x, eqn, " (the branches differ in it)") if is_lazy(x) else x
                for x, whole in zip(outs, fixed, strict=True)
                if whole is None
            ]

        return call

    outs = iter(lax.switch(index, [branch(*b) for b in branches], *operands))
    return [next(outs) if whole is None else whole for whole in fixed]


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
        tangents = [_instantiate(t) for t in tangents]
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


def _instantiate(t: Any) -> Any:
    if type(t) is not SymbolicZero:
        return t
    # float0, the tangent dtype of integers and keys, is no dtype of jax.numpy
    module = np if t.dtype == dtypes.float0 else jax.numpy
    return module.zeros(t.shape, t.dtype)


def _terms(primal: Any, t: Any) -> tuple[Any, Any]:
    """The two terms of one argument's tangent; that of an ordinary argument is all in the first."""
    if is_lazy(primal) and primal.a is not None:
        return tangents(primal, _instantiate(t.a), _instantiate(t.b))
    if is_lazy(primal):
        return _zero(primal.w), _zero(primal.w)
    return t, _zero(primal)
