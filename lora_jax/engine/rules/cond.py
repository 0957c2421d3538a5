"""Branches (`cond`, `switch`, `platform_dependent`), interpreted; they may also choose weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import jaxprs, provenance
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, RANK, SLOT, Axis, LazyWeight, is_lazy
from lora_jax.engine.provenance import Provenance
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "cond")
def _cond(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> Any:
    """Interpret each branch; a weight that all of them return in one form stays lazy."""
    index, *operands = args
    if is_lazy(index):
        return NotImplemented
    programs = [jaxprs.open_jaxpr(branch) for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None and ctx.infers:
        # One branch per platform; only the last is sure to trace here, so it shows the uses.
        return walk(*programs[-1], operands)
    fixed = [_weight_passed_through(programs, operands, i) for i in range(len(eqn.outvars))]
    branches = [_Branch(program, operands, fixed, walk) for program in programs]
    columns = zip(*(branch.outs for branch in branches), strict=True)
    chosen = [_common_form(column) for column in columns]

    def finish(branch: _Branch) -> Callable[..., list[Any]]:
        def call(*operands: Any) -> list[Any]:
            outs = zip(branch(*operands), chosen, strict=True)
            return [_finish(ctx, eqn, x, template) for x, template in outs]

        return call

    calls = [finish(branch) for branch in branches]
    if platforms is None:
        moving = lax.switch(index, calls, *operands)
    else:
        moving = _by_platform(platforms, calls, operands)
    outs = iter(moving)
    return [next(outs) if whole is None else whole for whole in fixed]


def _by_platform(
    platforms: Sequence[Sequence[str] | None], calls: Sequence[Callable], operands: Sequence[Any]
) -> list[Any]:
    """Rebuild a `jax.lax.platform_dependent`; the branch without a name is the default."""
    pairs = list(zip(platforms, calls, strict=True))
    named = {name: call for names, call in pairs if names is not None for name in names}
    default = next((call for names, call in pairs if names is None), None)
    return lax.platform_dependent(*operands, default=default, **named)


def _weight_passed_through(programs: Sequence[Any], operands: Sequence[Any], position: int) -> Any:
    """Return the operand that every branch returns unchanged as this output, if it is a weight."""
    sources = {
        jaxpr.invars.index(jaxpr.outvars[position])
        if jaxpr.outvars[position] in jaxpr.invars
        else None
        for jaxpr, _ in programs
    }
    source = sources.pop()
    lazy = None if sources or source is None else operands[source]
    return lazy if is_lazy(lazy) else None


class _Branch:
    """One branch, interpreted once; `outs` are its outputs as shapes, without those in `fixed`."""

    def __init__(self, program: Any, operands: Sequence[Any], fixed: Sequence[Any], walk: Walk):
        jaxpr, consts = program

        def call(*operands: Any) -> list[Any]:
            outs = zip(walk(jaxpr, consts, operands), fixed, strict=True)
            return [x for x, whole in outs if whole is None]

        self._walked = jax.make_jaxpr(call, return_shape=True)
        self._jaxpr, self.outs = self._walked(*operands)

    def __call__(self, *operands: Any) -> list[Any]:
        flat = jaxprs.evaluate(self._jaxpr, jax.tree.leaves(operands))
        return jax.tree.unflatten(jax.tree.structure(self.outs), flat)


def _common_form(outs: Sequence[Any]) -> LazyWeight | None:
    """Return the form of an output that is the same kind of weight in every branch, or None."""
    if not all(map(is_lazy, outs)):
        return None
    origin = provenance.choose([x.origin for x in outs])
    if origin is None:
        return None
    forms = [_normalize_axes(x, origin) for x in outs]
    kinds = {
        (jax.tree.structure(x), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)))
        for x in forms
    }
    return forms[0] if len(kinds) == 1 else None


def _normalize_axes(lazy: LazyWeight, origin: Provenance) -> LazyWeight:
    """Return the weight with its axes named by position, so that branches can agree."""
    names = {axis: Axis(axis.origins, i) for i, axis in enumerate(lazy.axes)}
    names |= {RANK: RANK, SLOT: SLOT}
    for _, axes in MEMBERS:  # summed axes, which the factors alone have
        for axis in getattr(lazy, axes):
            names.setdefault(axis, Axis(axis.origins, len(names)))
    renamed = lambda axes: tuple(names[axis] for axis in axes)
    members: dict[str, Any] = {axes: renamed(getattr(lazy, axes)) for _, axes in MEMBERS}
    return dataclasses.replace(lazy, axes=renamed(lazy.axes), origin=origin, **members)


def _finish(ctx: Context, eqn: Any, x: Any, chosen: LazyWeight | None) -> Any:
    if chosen is not None:
        return _normalize_axes(x, chosen.origin)
    return ctx.densify(x, eqn, " (the branches differ in it)") if is_lazy(x) else x
