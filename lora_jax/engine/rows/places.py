"""Where the rows are in each equation of a program."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.engine import jaxprs


class Maker(NamedTuple):
    """What makes an order of rows: an equation of the same program, by its id, and its output."""

    eqn: int
    output: int


class Place(NamedTuple):
    """Where an array has its rows: `[outer, rows, inner]` are one axis of it."""

    axis: int
    inner: int
    order: Maker | None = None  # P, if entry n of the axis is entry `P[n]` of such an axis


#: By the id of an equation, the place of each input; None of one without rows.
Places = Mapping[int, Sequence[Place | None]]


def transferred(wide: Any, program: Any, places: Places) -> Places:
    """Return the places of another trace of the same function, where the two are alike.

    Args:
      wide: the program, open, that the places are of.
      program: the same function with the batch's own number of rows.
      places: by the ids of the equations of `wide`.
    """
    found: dict[int, Sequence[Place | None]] = {}
    differ = set()
    pairs = [*_pairs(wide, program)]
    others = {id(eqn): id(other) for eqn, other in pairs}

    def here(place: Place | None) -> Place | None:
        if place is None or place.order is None:
            return place
        maker = others.get(place.order.eqn)
        return None if maker is None else place._replace(order=place.order._replace(eqn=maker))

    for eqn, other in pairs:
        place = [here(x) for x in places.get(id(eqn), ())]
        # One program that is called twice, with its rows elsewhere, has no one place of them.
        if found.setdefault(id(other), place) != place:
            differ.add(id(other))
    return {key: place for key, place in found.items() if key not in differ}


def _pairs(jaxpr: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the equations of two programs and of those inside, side by side.

    What JAX traces later, as derivatives that someone wrote, is not inside.
    """
    if len(jaxpr.eqns) != len(other.eqns):
        return
    for pair in zip(jaxpr.eqns, other.eqns, strict=True):
        if pair[0].primitive is not pair[1].primitive:
            return
        yield pair
        for inner in zip(*map(_programs, pair), strict=False):
            yield from _pairs(*inner)


def _programs(eqn: Any) -> list[Any]:
    """Return the programs among the parameters of an equation."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            jaxpr = jaxprs.open_jaxpr(x)[0]
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found
