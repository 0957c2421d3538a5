"""Whether a program mixes the rows of its batch, and where.

The program is traced with a number of rows that is a multiple of a prime which divides no other
size: an axis is an axis of rows, or has one merged into it, if the prime divides its size.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.engine import jaxprs
from lora_jax.engine.rows import sorting
from lora_jax.engine.rows.equations import MEND, Fact, Wide
from lora_jax.engine.rows.orders import Order, constant
from lora_jax.engine.rows.places import Maker, Place, Places


def prime_for(sizes: Sequence[int], after: int = 30) -> int:
    """Return a prime that divides none of these sizes, greater than `after`.

    >>> prime_for([31, 74])
    41
    """
    candidate = after + 1
    while any(n and n % candidate == 0 for n in sizes) or any(
        candidate % d == 0 for d in range(2, math.isqrt(candidate) + 1)
    ):
        candidate += 1
    return candidate


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a program."""

    outputs: Sequence[Fact]
    places: Places  # where its equations have rows
    #: Whether a loop asks all rows whether it goes on: a row alone may take fewer steps.
    waits: bool


def facts_of(jaxpr: Any, wide: Wide, adapted: Sequence[bool]) -> Facts:
    """Return what is known of a program.

    Args:
      jaxpr: the program, open.
      wide: the number of rows that it was traced with.
      adapted: which of its inputs have adapters.
    """
    facts = [Fact(adapted=x) for x in adapted]
    walk = _Walk(wide)
    return Facts(walk.outputs(jaxpr, facts), walk.places, walk.waits)


class _Walk:
    def __init__(self, wide: Wide):
        self._wide = wide
        self.places: dict[int, list[Place | None]] = {}
        self.waits = False
        self._lines = [""]  # of the equations around the program
        #: By program, the innermost last: the equation that makes an order, and its output.
        self._makers: list[dict[Order, Maker]] = []

    def outputs(self, jaxpr: Any, facts: Sequence[Fact]) -> list[Fact]:
        """Return what is known of each output of a program, from that of each input."""
        known: dict[Any, Fact] = dict(zip(jaxpr.invars, facts, strict=True))

        def read(atom: Any) -> Fact:
            if jaxprs.is_var(atom):
                return known.get(atom, Fact())
            return Fact(index=constant(atom.val))

        makers: dict[Order, Maker] = {}
        self._makers.append(makers)
        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, outs, strict=True))
            for i, fact in enumerate(outs):
                if fact.index is not None and fact.index.is_given and fact.index.order is not None:
                    makers.setdefault(fact.index.order, Maker(id(eqn), i))
        self._makers.pop()
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        self._lines.append(jaxprs.source_line(eqn) or self._lines[-1])
        try:
            return self._on_line(eqn, before)
        finally:
            self._lines.pop()

    def _on_line(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        self.places[id(eqn)] = [self._place(*x) for x in zip(eqn.invars, before, strict=True)]
        container = _CONTAINERS.get(eqn.primitive.name)
        if container is not None:
            return container(self, eqn, before)
        called = jaxprs.called_program(eqn)
        if called is not None and eqn.primitive.name != "pallas_call":
            return self.outputs(called[0], before)
        return sorting.facts(self._wide, eqn, before, self._lines[-1])

    def _place(self, atom: Any, fact: Fact) -> Place | None:
        """Return where a value has its rows, and what makes the order that they are in."""
        place = self._wide.place(atom, fact)
        if place is None or fact.order is None:
            return place
        maker = self._makers[-1].get(fact.order)
        return None if maker is None else Place(place.axis, fact.order.inner, maker)

    def _scan(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        body, _ = jaxprs.open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = jaxprs.scan_counts(eqn)
        facts = list(before)
        for i in range(n_consts + n_carry, len(facts)):
            facts[i] = dataclasses.replace(facts[i], number=False)  # of the step, not of the row
        if any(0 in self._wide.axes(v) for v in eqn.invars[n_consts + n_carry :]):
            where = f"`scan` at {self._lines[-1]} carries from row to row, which mixes the rows"
            for i in range(n_consts, n_consts + n_carry):
                facts[i] = facts[i].mixed_by(f"{where}. {MEND}")
        return self._loop(body, facts, range(n_consts, n_consts + n_carry))

    def _while(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        cond, _ = jaxprs.open_jaxpr(eqn.params["cond_jaxpr"])
        body, _ = jaxprs.open_jaxpr(eqn.params["body_jaxpr"])
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        facts = list(before[n_cond:])
        outs = self._loop(body, facts, range(n_body, len(facts)))
        asked = [*before[:n_cond], *outs]
        if not any(x.mixed for x in asked):
            self.waits |= self.outputs(cond, asked)[0].mixed is not None
        return outs

    def _loop(self, body: Any, facts: list[Fact], carried: range) -> list[Fact]:
        """Return the facts of the outputs, once those of the carry no longer change."""
        facts = [Fact.join(x) if i in carried else x for i, x in enumerate(facts)]
        while True:
            outs = self.outputs(body, facts)
            joined = [Fact.join(facts[i], out) for i, out in zip(carried, outs, strict=False)]
            if joined == [facts[i] for i in carried]:
                return outs
            facts[carried.start : carried.stop] = joined

    def _cond(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        branches = [jaxprs.open_jaxpr(b)[0] for b in eqn.params["branches"]]
        found = [self.outputs(branch, before[1:]) for branch in branches]
        chosen = [Fact.join(*outs) for outs in zip(*found, strict=True)]
        return [x.mixed_by(before[0].mixed) for x in chosen]

    def _shard_map(self, eqn: Any, before: Sequence[Fact]) -> Sequence[Fact]:
        specs = jaxprs.shard_map_arguments(eqn)["in_specs"]
        divided = any(
            entry is not None and axis in self._wide.axes(v)
            for v, spec in zip(eqn.invars, specs, strict=True)
            for axis, entry in enumerate(spec)
        )
        if divided:
            where = (
                f"`shard_map` at {self._lines[-1]} divides the rows among devices, and mixes the "
                "rows of one device. Put it into a jax.vmap over the rows, and let JAX divide them"
            )
            return [Fact(mixed=where) for _ in eqn.outvars]
        body, _ = jaxprs.open_jaxpr(eqn.params["jaxpr"])
        return self.outputs(body, before)


_CONTAINERS: dict[str, Callable[[_Walk, Any, Sequence[Fact]], Sequence[Fact]]] = {
    "scan": _Walk._scan,
    "while": _Walk._while,
    "cond": _Walk._cond,
    "shard_map": _Walk._shard_map,
}
