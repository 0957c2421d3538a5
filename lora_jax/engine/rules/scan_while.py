"""`scan` and `while`, rebuilt around lazy weights: what is scanned over stays scanned over."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.core.quantized.parts import blocked_axis
from lora_jax.engine import jaxprs, named_axes
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, LazyWeight, is_lazy
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "scan")
def _scan(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Scan the factors that have the scanned axis, so that weights among `xs` stay `xs`.

    Closing over the stacked weights and indexing them would copy each of them.
    """
    params = eqn.params
    jaxpr, jaxpr_consts = jaxprs.open_jaxpr(params["jaxpr"])
    n_consts, n_carry = jaxprs.scan_counts(eqn)
    consts = list(args[:n_consts])
    carried = args[n_consts : n_consts + n_carry]
    loop = _Carry(ctx, eqn, jaxpr, carried, offset=n_consts)
    items = [_with_base_in_steps(ctx, eqn, x) for x in args[n_consts + n_carry :]]
    scanned = [_Scanned(x) if is_lazy(x) else None for x in items]
    xs = [x if s is None else s.xs for x, s in zip(items, scanned, strict=True)]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        items = [x if s is None else s.at_step(x) for x, s in zip(slices, scanned, strict=True)]
        outs = walk(jaxpr, jaxpr_consts, [*consts, *loop.all(carry), *items])
        return loop.moving(outs[:n_carry]), [_ready(ctx, eqn, x) for x in outs[n_carry:]]

    carry, ys = lax.scan(
        body,
        loop.start,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return loop.all(carry) + [_stack_steps(y, params["length"]) if is_lazy(y) else y for y in ys]


def _with_base_in_steps(ctx: Context, eqn: Any, x: Any) -> Any:
    """Return a weight among the `xs`, dequantized if its first axis does not divide its codes."""
    if not is_lazy(x) or not isinstance(x.w, QuantizedView):
        return x
    if x.w.is_movable and blocked_axis(x.w.weight) != 0:
        return x
    return ctx.dequantize(x, eqn, " (its steps are not whole codes and scales)")


def _ready(ctx: Context, eqn: Any, x: Any) -> Any:
    """Return an output of one step; a weight has nothing pending, which could not be stacked."""
    waits = is_lazy(x) and isinstance(x.w, QuantizedView) and x.w.pending
    return ctx.dequantize(x, eqn, " (its steps are stacked)") if waits else x


class _Scanned:
    """A lazy weight among the `xs` of a scan: what is sliced, and how a slice is a weight again."""

    def __init__(self, lazy: LazyWeight):
        lead = lazy.axes[0]
        self.xs: dict[str, Any] = {} if lazy.w is None else {"w": _sliced(lazy.w)}
        static: dict[str, Any] = {"axes": lazy.axes[1:], "shape": lazy.shape[1:]}
        for name, axes in MEMBERS:
            if lead in getattr(lazy, axes):
                moved, names = named_axes.move_first(getattr(lazy, name), getattr(lazy, axes), lead)
                self.xs[name] = moved
                static[axes] = tuple(names[1:])
        origin = lazy.origin.index_away(lead.origins)
        self._template = dataclasses.replace(lazy, origin=origin, **static)

    def at_step(self, slices: dict[str, Any]) -> LazyWeight:
        """Return the weight of one step."""
        if isinstance(self._template.w, QuantizedView):
            slices = slices | {"w": dataclasses.replace(self._template.w, weight=slices["w"])}
        return dataclasses.replace(self._template, **slices)


def _sliced(w: Any) -> Any:
    """Return the arrays of a base that have its first axis."""
    return w.weight if isinstance(w, QuantizedView) else w


def _stack_steps(lazy: LazyWeight, length: int) -> LazyWeight:
    """Return the weight that a scan stacked step by step: every member has a new leading axis."""
    lead = lazy.new_axis()
    changes: dict[str, Any] = {"axes": (lead, *lazy.axes), "shape": (length, *lazy.shape)}
    for name, axes in MEMBERS:
        if getattr(lazy, name) is not None:
            changes[axes] = (lead, *getattr(lazy, axes))
    row = jax.tree.map(lambda x: x[0], lazy.row)  # the same in every step
    return dataclasses.replace(lazy, row=row, **changes)


class _Carry:
    """The carry of a loop. Weights that the body returns unchanged stay lazy, outside the carry."""

    def __init__(self, ctx: Context, eqn: Any, body: Any, init: Sequence[Any], offset: int):
        self._ctx, self._eqn = ctx, eqn
        ins, outs = body.invars[offset : offset + len(init)], body.outvars[: len(init)]
        self._fixed = [
            x if is_lazy(x) and i is o else None for x, i, o in zip(init, ins, outs, strict=True)
        ]
        self.start = [
            ctx.densify(x, eqn, " (the loop changes it)") if is_lazy(x) else x
            for x, fixed in zip(init, self._fixed, strict=True)
            if fixed is None
        ]

    def all(self, moving: Sequence[Any]) -> list[Any]:
        """Return all carried values, from those that the loop changes."""
        values = iter(moving)
        return [next(values) if fixed is None else fixed for fixed in self._fixed]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        """Return the values that the loop changes, none of them lazy, from all carried values."""
        return [
            self._ctx.densify(x, self._eqn, " (the loop changes it)") if is_lazy(x) else x
            for x, fixed in zip(values, self._fixed, strict=True)
            if fixed is None
        ]


@rule(CONTAINERS, "while")
def _while(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Rebuild the loop; weights that it carries unchanged are closed over."""
    params = eqn.params
    cond, cond_consts = jaxprs.open_jaxpr(params["cond_jaxpr"])
    body, body_consts = jaxprs.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = list(args[:n_cond]), list(args[n_cond : n_cond + n_body])
    loop = _Carry(ctx, eqn, body, args[n_cond + n_body :], offset=n_body)

    def continues(carry: Sequence[Any]) -> Any:
        return walk(cond, cond_consts, [*for_cond, *loop.all(carry)])[0]

    def step(carry: Sequence[Any]) -> Sequence[Any]:
        moved = loop.moving(walk(body, body_consts, [*for_body, *loop.all(carry)]))
        if not cond.outvars[0].aval.shape:
            return moved
        # Under vmap each example has its own condition: those that are done keep their values.
        going = continues(carry)
        return [_where(going, new, old) for new, old in zip(moved, carry, strict=True)]

    return loop.all(lax.while_loop(lambda carry: continues(carry).any(), step, loop.start))


def _where(going: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return `new` for the examples that continue, else `old`; the axes of examples lead."""
    chosen = lax.broadcast_in_dim(going, new.shape, range(going.ndim))
    return lax.select(chosen, new, old)
