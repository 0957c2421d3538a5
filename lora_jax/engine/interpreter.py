"""Walking a program with lazy weights in it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.custom_rules import apply_rule
from lora_jax.engine.lazy_weight import is_lazy
from lora_jax.engine.rules import (
    concatenate,
    cond,
    conv,
    custom_jvp,
    custom_vjp,
    dot_general,
    indexing,
    jit_remat,
    ragged_dot,
    scan_while,
    shard_map,
    views,
)
from lora_jax.engine.shared_activations import Sharing
from lora_jax.engine.uses import OPAQUE

RULES = {
    **views.RULES,
    **concatenate.RULES,
    **indexing.RULES,
    **dot_general.RULES,
    **conv.RULES,
    **ragged_dot.RULES,
    **shard_map.RULES,
}
CONTAINERS = {
    **jit_remat.CONTAINERS,
    **cond.CONTAINERS,
    **scan_while.CONTAINERS,
    **custom_jvp.CONTAINERS,
    **custom_vjp.CONTAINERS,
    **shard_map.CONTAINERS,
}


def interpret(ctx: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate `jaxpr`; inputs and outputs are arrays or `LazyWeight`s.

    An equation that no weight touches is handed back to JAX as it stands, with its source line and
    name scopes; a touched one goes to its rule, and where there is none the weight is made dense.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last = jaxprs.last_uses(jaxpr)
    shared = _sharing(ctx, jaxpr, args)
    early: set[int] = set()

    def read(atom: Any) -> Any:
        return env[atom] if jaxprs.is_var(atom) else atom.val

    def evaluate(i: int) -> None:
        eqn = jaxpr.eqns[i]
        values = [read(atom) for atom in eqn.invars]
        with jaxprs.equation_context(eqn):
            env.update(zip(eqn.outvars, _evaluate(ctx, eqn, values), strict=True))

    def prepare(i: int) -> None:
        """Evaluate now what an equation needs and what only views of weights lead to."""
        for atom in jaxpr.eqns[i].invars:
            if jaxprs.is_var(atom) and atom not in env:
                prepare(shared.producers[atom])
                evaluate(shared.producers[atom])
                early.add(shared.producers[atom])

    for i, eqn in enumerate(jaxpr.eqns):
        if i in shared.groups:
            for j in shared.groups[i]:
                prepare(j)
            group = [jaxpr.eqns[j] for j in shared.groups[i]]
            with jaxprs.equation_context(eqn):
                dot_general.share(ctx, [(e, [read(atom) for atom in e.invars]) for e in group])
        if i not in early:
            evaluate(i)
        for atom in eqn.invars:  # let go of what nothing reads any more
            if jaxprs.is_var(atom) and last[atom] == i:
                env.pop(atom, None)
    return [read(atom) for atom in jaxpr.outvars]


def _sharing(ctx: Context, jaxpr: Any, args: Sequence[Any]) -> Sharing:
    weights = [ctx.forms.share and is_lazy(x) and x.a is not None for x in args]
    return Sharing(jaxpr, weights, views.RULES.__contains__)


def _evaluate(ctx: Context, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    if not any(map(is_lazy, values)):
        return jaxprs.bind(eqn, values)
    name, outer = eqn.primitive.name, ctx.enclosing

    def walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        ctx.enclosing = eqn if jaxprs.source_line(eqn) else outer
        outs = interpret(ctx, jaxpr, consts, args)
        ctx.enclosing = outer
        return outs

    if name in ctx.rules:
        outs = apply_rule(ctx, ctx.rules[name], eqn, values)
    elif name in CONTAINERS:
        outs = CONTAINERS[name](ctx, eqn, values, walk)
    elif name in RULES:
        outs = RULES[name](ctx, eqn, values)
    elif ctx.infers and (called := jaxprs.called(eqn)) is not None:
        # The boundary itself is made dense when it runs; the program inside still tells the layout.
        outs = walk(*called, values)
    else:
        outs = NotImplemented
    return _made_dense(ctx, eqn, values) if outs is NotImplemented else outs


def _made_dense(ctx: Context, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The equation on dense weights."""
    why = " (it cannot be looked into)" if eqn.primitive.name in OPAQUE else ""
    outs = jaxprs.bind(eqn, [ctx.make_dense(v, eqn, why) if is_lazy(v) else v for v in values])
    if ctx.infers and len(outs) == 1:
        # A masked or normalised weight is one still: what contracts it tells the layout.
        for lazy in filter(is_lazy, values):
            if lazy.is_whole and lazy.shape == outs[0].shape and lazy.dtype == outs[0].dtype:
                origin = dataclasses.replace(lazy.origin, altered=True)
                return [dataclasses.replace(lazy, w=outs[0], origin=origin)]
    return outs
