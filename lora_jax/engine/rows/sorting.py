"""Rows that a program sorts and puts back: what is known of them in between.

A mixture of experts sorts the tokens of all rows by expert, multiplies them in groups by
`ragged_dot`, and puts them back. No token meets another one: which group it is in is its own
choice, as the sizes of the groups count the choices that were sorted by. What is not found here to
be undone stays mixed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax.engine.rows.equations import Fact, Wide
from lora_jax.engine.rows.orders import PLACE, Index, Order, computed

#: `rule(wide, eqn, before, found)`: the facts of the outputs in place of those `found` by the
#: table of equations; None where it knows nothing else.
Rule = Callable[[Wide, Any, Sequence[Fact], Sequence[Fact]], Sequence[Fact] | None]

_RULES: dict[str, Rule] = {}


def _rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


def facts(wide: Wide, eqn: Any, before: Sequence[Fact], line: str) -> Sequence[Fact]:
    """Return what is known of the outputs of an equation, which is on this line."""
    found = wide.facts(eqn, before, line)
    rule = _RULES.get(eqn.primitive.name)
    for known in (rule, _numbers, _groups, _kept_in_order):
        if known is not None and (better := known(wide, eqn, before, found)) is not None:
            return better
    return found


# --- what is sorted -------------------------------------------------------------------------------


@_rule("sort")
def _sort(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    key, size = eqn.invars[0], eqn.invars[0].aval.size
    if eqn.params["num_keys"] != 1 or key.aval.ndim != 1 or not wide.axes(key):
        return None
    index = before[0].index
    if index is not None and index.kind == "order" and index.is_identity(size):
        return [_undone(index.order, *x) for x in zip(before, found, strict=True)]
    place, where = wide.place(key, before[0]), found[0].mixed
    if before[0].mixed or place is None or where is None or size % (wide.total * place.inner):
        return None
    order = Order(where, size, place.inner, wide.total, before[0].group)
    outs = []
    for fact, out in zip(before, found, strict=True):
        index = fact.index
        if index is not None and index.kind == "place" and index.is_identity(size):
            given = Index("order", lambda n: n, order, is_given=True)
            outs.append(dataclasses.replace(out, index=given))
        else:
            outs.append(out if fact.mixed else dataclasses.replace(out, order=order))
    return outs


def _undone(order: Order | None, fact: Fact, out: Fact) -> Fact:
    """Return what is known of an operand that is put back by sorting the order itself."""
    if order is None:
        return out
    if fact.order is order:
        return dataclasses.replace(out, mixed=None, inner=order.inner)
    if fact.index is not None and fact.index.kind == "place" and fact.index.is_identity(order.size):
        return dataclasses.replace(out, index=Index("inverse", lambda n: n, order))
    return out


@_rule("iota")
def _iota(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    out = eqn.outvars[0]
    if out.aval.ndim != 1 or not wide.axes(out):
        return None
    return [dataclasses.replace(found[0], index=PLACE)]


# --- indexing by an order -------------------------------------------------------------------------


@_rule("gather")
def _gather(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    x, index = eqn.invars[0], before[1].index
    numbers, axes = eqn.params["dimension_numbers"], tuple(wide.axes(x))
    along = numbers.start_index_map == numbers.collapsed_slice_dims == axes
    if index is None or index.order is None or not along or len(axes) != 1:
        return None
    order = index.order
    if index.kind == "inverse" and before[0].order is order and index.is_identity(order.size):
        return [dataclasses.replace(found[0], mixed=None, inner=order.inner)]
    place = wide.place(x, before[0])
    if before[0].mixed or place is None or not index.stays_in_row(place.inner):
        return None
    return [dataclasses.replace(found[0], order=order)]


@_rule("scatter", "scatter-add", "scatter_add")
def _scatter(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    old, _, new = eqn.invars
    into, index, given = before[0], before[1].index, before[2]
    numbers = eqn.params["dimension_numbers"]
    axes = tuple(wide.axes(old))
    adds = eqn.primitive.name != "scatter"
    if not axes:
        ones = given.index is not None and given.index.is_constant(1)
        zeros = into.index is not None and into.index.is_constant(0)
        counts = adds and ones and zeros and old.aval.ndim == 1 and new.aval.size
        return [dataclasses.replace(found[0], counts=before[1].group)] if counts else None
    along = numbers.scatter_dims_to_operand_dims == numbers.inserted_window_dims == axes
    if index is None or index.order is None or not along or into.mixed:
        return None
    order, size = index.order, old.aval.shape[axes[0]]
    filled = into.index is not None and into.index.kind == "constant"
    inner = size // wide.total if filled else into.inner
    if not adds and not index.is_identity(size):
        return None  # of several entries that are written to one place the last one counts
    if given.order is order and index.stays_in_row(inner):
        return [dataclasses.replace(found[0], mixed=None, inner=inner)]
    if not adds and filled and given.index is not None and given.index.is_identity(size):
        return [dataclasses.replace(found[0], index=Index("inverse", lambda n: n, order))]
    return None


# --- numbers, and groups --------------------------------------------------------------------------


def _numbers(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    """Follow integers that are computed from an order, one by one."""
    indices = [x.index for x in before if x.index is not None]
    if not indices or len(indices) != len(before) or len(found) != 1:
        return None
    constant = all(x.kind == "constant" for x in indices)
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if not constant and any(x.dtype.kind not in "iub" for x in avals):
        return None
    index = computed(eqn.primitive.name, indices)
    if index is None:
        return None
    sizes = {v.aval.size for v, x in zip(eqn.invars, indices, strict=True) if x.kind != "constant"}
    if sizes and {eqn.outvars[0].aval.size} != sizes:
        return None  # it is repeated, or some of it is left out
    return [dataclasses.replace(found[0], index=index)]


_SAME = {"convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "copy"}
_SAME |= {"copy_p", "stop_gradient", "broadcast_in_dim"}


@_rule("top_k", "argmax", "argmin")
def _choose(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    return [*found[:-1], dataclasses.replace(found[-1], group=object())]


def _groups(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    """Follow numbers of groups, and how many entries each has, where they stay the same."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    groups = [x for x in before if x.group is not None]
    if name in _SAME and before[0].counts is not None:
        same = out.size == eqn.invars[0].aval.size and out.dtype.kind in "iu"
        return [dataclasses.replace(found[0], counts=before[0].counts)] if same else None
    if not groups or len(found) != 1:
        return None
    if name == "lt" and before[0].group is not None and before[1].index is not None:
        if before[1].index.is_constant(0):
            never = Index("constant", lambda n: n[:1] * 0)
            return [dataclasses.replace(found[0], index=never)]
        return None
    same = name in _SAME
    if name == "max":
        same = any(x.index is not None and x.index.is_constant(0) for x in before)
    if name == "select_n":
        same = before[0].index is not None and before[0].index.is_constant(0)
        groups = [before[1]]
    if not same or out.size != max(v.aval.size for v in eqn.invars) or out.dtype.kind not in "iu":
        return None
    return [dataclasses.replace(found[0], group=groups[0].group)]


# --- what stays in an order -----------------------------------------------------------------------


@_rule("ragged_dot_general")
def _ragged_dot(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    x, w, _ = eqn.invars
    order, numbers = before[0].order, eqn.params["ragged_dot_dimension_numbers"]
    _, batch = numbers.dot_dimension_numbers
    apart = order is not None and order.group is not None and order.group is before[2].counts
    if not apart or before[1].mixed or wide.axes(w) or any(batch):
        return found
    if tuple(wide.axes(x)) != tuple(numbers.lhs_ragged_dimensions):
        return found
    summed = numbers.dot_dimension_numbers[0][0]
    if {*summed} & {*wide.axes(x)} or x.aval.ndim != len(summed) + 1:
        return found
    return [dataclasses.replace(found[0], order=order)]


def _kept_in_order(
    wide: Wide, eqn: Any, before: Sequence[Fact], found: Sequence[Fact]
) -> Sequence[Fact] | None:
    """Follow what is in an order through an equation that leaves rows apart."""
    orders = {x.order for x in before if x.order is not None}
    if len(orders) != 1:
        return None
    (order,) = orders
    clean = []
    for v, fact in zip(eqn.invars, before, strict=True):
        constant = fact.index is not None and fact.index.kind == "constant"
        if fact.order is None and (fact.mixed or (wide.axes(v) and not constant)):
            return None
        inner = fact.inner if fact.order is None else order.inner
        clean.append(dataclasses.replace(fact, mixed=None, order=None, inner=inner))
    for v in (*eqn.outvars, *(v for v, x in zip(eqn.invars, before, strict=True) if x.order)):
        if [v.aval.shape[i] for i in wide.axes(v)] != [order.size]:
            return None
    apart = wide.facts(eqn, clean, "")
    if any(x.mixed for x in apart):
        return None
    return [dataclasses.replace(x, order=order) for x in found]
