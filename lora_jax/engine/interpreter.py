"""The interpreter: evaluate a jaxpr some of whose values are lazy weights."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.custom_rules import apply_rule
from lora_jax.engine.lazy_weight import is_lazy
from lora_jax.engine.quantized.merge_aware import if_merged
from lora_jax.engine.rows.mapped import bind_mapped
from lora_jax.engine.rows.slots import NoPlaceForRows, pick
from lora_jax.engine.rules import CONTAINERS, RULES, is_view, keeps_slots
from lora_jax.engine.rules.dot_general import share
from lora_jax.engine.schedule import schedule
from lora_jax.engine.stretches import Stretch
from lora_jax.engine.uses import OPAQUE


def interpret(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr`; inputs and outputs are arrays or `LazyWeight`s.

    Equations without lazy inputs are handed back to JAX unchanged, with their source lines and name
    scopes; in stretches, where JAX differentiates or maps them. One with lazy inputs goes to its
    rule; where there is none, the weight is materialized.
    """
    with ctx.inside_program(jaxpr):
        return _interpret(ctx, jaxpr, consts, args)


def _interpret(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return env[atom] if jaxprs.is_var(atom) else atom.val

    can_share = [ctx.forms.share and is_lazy(x) and x.a is not None for x in args]
    weights = {v for v, can in zip(jaxpr.invars, can_share, strict=True) if can}
    steps = schedule(jaxpr, weights, is_view)
    one = Picks()
    transformed = jaxprs.are_transformed([*consts, *args])
    at = 0
    while at < len(steps):
        step, end = steps[at][0], at + 1
        with jaxprs.equation_context(step.eqns[0]):
            if transformed and (stretch := Stretch.at(steps, at, env, ctx.stands_alone)):
                env.update(zip(stretch.outputs, stretch.run(env), strict=True))
                end = at + stretch.length
            else:
                inputs = [(eqn, [read(atom) for atom in eqn.invars]) for eqn in step.eqns]
                inputs = [(eqn, one.row(ctx, eqn, values)) for eqn, values in inputs]
                if step.is_group:
                    share(ctx, inputs)
                else:
                    outs = _evaluate(ctx, *inputs[0])
                    ctx.keep_orders(step.eqns[0], outs)
                    env.update(zip(step.eqns[0].outvars, outs, strict=True))
        for v in itertools.chain.from_iterable(unread for _, unread in steps[at:end]):
            env.pop(v, None)
        at = end
    return [read(atom) for atom in jaxpr.outvars]


class Picks:
    """The adapters that rows picked while one program is interpreted, each of them once."""

    def __init__(self) -> None:
        self._picked: dict[int, tuple[Any, Any]] = {}  # by id, with the weight that has it

    def row(self, ctx: Context, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Return the inputs of an equation; what needs one row's adapter gets that alone."""
        name = eqn.primitive.name
        if keeps_slots(name) and name not in ctx.rules:
            return list(values)
        weights = [x for x in values if is_lazy(x) and x.row is not None]
        if any(x.row.slot.ndim for x in weights):
            if name in ctx.rules or name not in ("dot_general", "ragged_dot_general"):
                raise NoPlaceForRows
            if name == "ragged_dot_general":
                return list(values)  # each entry picks its adapter
        return [self._one(x) if is_lazy(x) and x.row is not None else x for x in values]

    def _one(self, lazy: Any) -> Any:
        if id(lazy) not in self._picked:
            self._picked[id(lazy)] = lazy, pick(lazy)
        return self._picked[id(lazy)][1]


def _evaluate(ctx: Context, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Return the outputs of one equation."""
    if not any(map(is_lazy, values)):
        return bind_mapped(eqn, values) if ctx.maps_rows else jaxprs.bind(eqn, values)
    # A derivative inside may be traced after we have left: what encloses it is settled here.
    name, enclosing = eqn.primitive.name, ctx.with_line(eqn)

    def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        with ctx.inside(enclosing):
            return interpret(ctx, jaxpr, consts, args)

    outs: Any = NotImplemented
    if name in ctx.rules:
        outs = apply_rule(ctx, ctx.rules[name], eqn, values)
    elif name in CONTAINERS:
        outs = CONTAINERS[name](ctx, eqn, values, walk)
    elif name in RULES:
        outs = if_merged(RULES[name], ctx, eqn, values)
    elif ctx.infers and (called := jaxprs.called_program(eqn)) is not None:
        # When this runs the weight is materialized here, but the program inside shows the layout.
        outs = walk(*called, values)
    return _evaluate_dense(ctx, eqn, values) if outs is NotImplemented else outs


def _evaluate_dense(ctx: Context, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Return the outputs of an equation on materialized weights."""
    why = " (it is opaque)" if eqn.primitive.name in OPAQUE else ""
    bind = bind_mapped if ctx.maps_rows else jaxprs.bind
    outs = bind(eqn, [ctx.densify(v, eqn, why) if is_lazy(v) else v for v in values])
    if ctx.infers and len(outs) == 1:
        # A masked or normalized weight still is one: what contracts it shows the layout.
        for lazy in filter(is_lazy, values):
            if lazy.is_whole and lazy.shape == outs[0].shape and lazy.dtype == outs[0].dtype:
                origin = dataclasses.replace(lazy.origin, altered=True)
                return [dataclasses.replace(lazy, w=outs[0], origin=origin)]
    return outs
