"""How the codes and scales of a quantized weight pass through an equation, by primitive.

Where they cannot (a reshape that divides a block), the equation waits until a product dequantizes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.quantized.parts import (
    blocked_axis,
    holds_for_all,
    is_loose,
    slice_weight,
    with_fields,
)
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.sharding.quantized import field_specs
from lora_jax.engine import jaxprs, named_axes, stretches
from lora_jax.engine.quantized.view import QuantizedView, Step

#: `move(eqn, *inputs)` returns the outputs as codes and scales, None for one that cannot be.
Move = Callable[..., Sequence[QuantizedWeight | None]]

#: By primitive, for equations whose first input is the only quantized weight.
MOVES: dict[str, Move] = {}

#: By primitive, for equations that make one weight of several.
JOINS: dict[str, Callable[..., QuantizedWeight | None]] = {}


def _move(*primitives: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., QuantizedWeight | None]) -> Callable[..., Any]:
        MOVES.update(dict.fromkeys(primitives, lambda *inputs: [fn(*inputs)]))
        return fn

    return register


def apply(eqn: Any, values: Sequence[Any], which: Any = None) -> list[QuantizedView]:
    """Return the outputs of an equation, of whose inputs at least one is a `QuantizedView`.

    `which` is the first input of a `select_n`, of size one along axes where it does not vary.
    """
    name = eqn.primitive.name
    at = next(i for i, x in enumerate(values) if isinstance(x, QuantizedView))
    view, others = values[at], [*values[:at], *values[at + 1 :]]
    if name in _UNCHANGED:
        return [view]
    are_arrays = not any(isinstance(x, QuantizedView) for x in others)
    if name in _NUMBER_BY_NUMBER and are_arrays and all(np.size(x) == 1 for x in others):
        return [_number_by_number(eqn, view, others)]
    moved: Sequence[QuantizedWeight | None] = [None] * len(eqn.outvars)
    if name in JOINS:
        joined = _joined(eqn, values, which)
        if joined is not None:
            return [QuantizedView(joined)]
    elif name in MOVES and at == 0 and view.is_movable and are_arrays:
        moved = MOVES[name](eqn, view.weight, *others)
    return [
        view.then(_step_of(eqn, at, i), *others)
        if weight is None
        else dataclasses.replace(view, weight=weight)
        for i, weight in enumerate(moved)
    ]


def _step_of(eqn: Any, at: int, output: int) -> Step:
    """Return the step that computes an output of an equation whose input `at` are the values."""
    aval = eqn.outvars[output].aval

    def call(values: jax.Array, *others: Any) -> jax.Array:
        with jaxprs.line_context(eqn):
            return jaxprs.bind(eqn, [*others[:at], values, *others[at:]])[output]

    key = (stretches.spelling(eqn) or id(eqn), at, output)
    return Step(call, key, tuple(aval.shape), aval.dtype)


# --- number by number -----------------------------------------------------------------------------

#: Primitives that change no number.
_UNCHANGED = ("copy", "copy_p", "name", "stop_gradient")

_NUMBER_BY_NUMBER: dict[str, Callable[..., jax.Array]] = {
    "neg": lax.neg,
    "mul": lax.mul,
    "div": lax.div,
    "convert_element_type": lambda x: x,
}


def _number_by_number(eqn: Any, view: QuantizedView, others: Sequence[Any]) -> QuantizedView:
    """Return the view after a cast, a sign or a scalar factor, whatever its shape is then."""
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    # The values are computed in float32, so a cast of what has at least as many bits is theirs.
    if name == "convert_element_type" and not view.pending and view.weight.dtype.itemsize > 2:
        return dataclasses.replace(
            view, weight=dataclasses.replace(view.weight, dtype=np.dtype(dtype))
        )

    fixed = [np.asarray(x, view.dtype).reshape(()) for x in others if not isinstance(x, jax.Array)]
    scalars = [x.reshape(()) for x in others if isinstance(x, jax.Array)]

    def call(values: jax.Array, *scalars: jax.Array) -> jax.Array:
        return _NUMBER_BY_NUMBER[name](values, *fixed, *scalars).astype(dtype)

    return view.then(Step(call, (name, *(x.tobytes() for x in fixed)), None, dtype), *scalars)


# --- views of one weight --------------------------------------------------------------------------


@_move("transpose")
def _transpose(eqn: Any, w: QuantizedWeight) -> QuantizedWeight:
    order = eqn.params["permutation"]
    return with_fields(w, lambda x: lax.transpose(x, order), list(order).index(blocked_axis(w)))


@_move("squeeze")
def _squeeze(eqn: Any, w: QuantizedWeight) -> QuantizedWeight | None:
    at, gone = blocked_axis(w), eqn.params["dimensions"]
    if at in gone:
        return None
    return with_fields(w, lambda x: lax.squeeze(x, gone), at - sum(d < at for d in gone))


@_move("broadcast_in_dim")
def _expand_dims(eqn: Any, w: QuantizedWeight, *dynamic: Any) -> QuantizedWeight | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [d for d in range(len(shape)) if d not in dims]
    grows = any(shape[d] != n for d, n in zip(dims, w.shape, strict=True))
    if dynamic or grows or any(shape[d] != 1 for d in new):
        return None
    return with_fields(w, lambda x: lax.expand_dims(x, new), dims[blocked_axis(w)])


@_move("reshape")
def _reshape(eqn: Any, w: QuantizedWeight, *dynamic: Any) -> QuantizedWeight | None:
    """Split the blocked axis in whole blocks, or join it with axes before it."""
    new, at = list(eqn.outvars[0].aval.shape), blocked_axis(w)
    params = eqn.params
    if dynamic or params["dimensions"] or params.get("sharding") is not None or w.shape[at] == 1:
        return None
    groups = named_axes.reshape_groups(w.shape, new)
    olds, news = next(group for group in groups if at in group[0])
    splits, joins = len(news) > 1, len(olds) > 1
    to = news[-1]
    if (splits and joins) or (joins and olds[-1] != at):
        return None
    if splits and new[to] % w.block and not is_loose(w):
        return None
    if joins and any(field.per_weight == 0 for field in w.format.fields.values()):
        return None  # it may differ between the rows that are joined
    parts = math.prod(new[j] for j in news[:-1])
    rows = math.prod(w.shape[i] for i in olds[:-1])
    fields: dict[str, jax.Array] = {}
    for name, x in w.fields.items():
        if splits and holds_for_all(w, name):
            narrow = [1 if j in news else n for j, n in enumerate(new)]
            wide = [1 if j == to else n for j, n in enumerate(new)]
            fields[name] = jnp.broadcast_to(lax.reshape(x, narrow), wide)
        else:
            shape = [*new[:to], x.shape[at] * rows // parts, *new[to + 1 :]]
            fields[name] = lax.reshape(x, shape)
    return QuantizedWeight(fields, w.kind, to - len(new), w.dtype)


@_move("rev")
def _rev(eqn: Any, w: QuantizedWeight) -> QuantizedWeight | None:
    gone, at = eqn.params["dimensions"], blocked_axis(w)
    if at in gone and not is_loose(w):
        return None
    return with_fields(w, lambda x: lax.rev(x, gone), at)


@_move("slice")
def _slice(eqn: Any, w: QuantizedWeight) -> QuantizedWeight | None:
    params = eqn.params
    strides = params["strides"] or (1,) * w.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return slice_weight(w, list(bounds))


def _split(eqn: Any, w: QuantizedWeight) -> list[QuantizedWeight | None]:
    axis, whole = eqn.params["axis"], [(0, n, 1) for n in w.shape]
    ends = list(itertools.accumulate(eqn.params["sizes"]))
    bounds = zip([0, *ends], ends, strict=False)
    return [slice_weight(w, [*whole[:axis], (*b, 1), *whole[axis + 1 :]]) for b in bounds]


def _unstack(eqn: Any, w: QuantizedWeight) -> Sequence[QuantizedWeight | None]:
    axis, at = eqn.params["axis"], blocked_axis(w)
    if axis == at:
        return [None] * w.shape[axis]
    index = lambda n: lambda x: lax.index_in_dim(x, n, axis, keepdims=False)
    return [with_fields(w, index(n), at - (axis < at)) for n in range(w.shape[axis])]


MOVES |= {"split": _split, "unstack": _unstack}


@_move("dynamic_slice")
def _dynamic_slice(eqn: Any, w: QuantizedWeight, *starts: Any) -> QuantizedWeight | None:
    at, sizes = blocked_axis(w), eqn.params["slice_sizes"]
    if len(starts) != w.ndim:
        return None
    loose = is_loose(w)
    if sizes[at] != w.shape[at] and not loose:
        if isinstance(starts[at], jax.core.Tracer):
            return None
        start = min(max(int(starts[at]), 0), w.shape[at] - sizes[at])
        bounds = [(0, n, 1) for n in w.shape]
        part = slice_weight(w, [*bounds[:at], (start, start + sizes[at], 1), *bounds[at + 1 :]])
        if part is None:
            return None
        w = part
    fields: dict[str, jax.Array] = {}
    for name, x in w.fields.items():
        own_starts, own_sizes = list(starts), list(sizes)
        if holds_for_all(w, name) or not loose:
            own_starts[at], own_sizes[at] = jnp.zeros_like(starts[at]), x.shape[at]
        fields[name] = lax.dynamic_slice(x, own_starts, own_sizes, allow_negative_indices=False)
    return dataclasses.replace(w, fields=fields)


# --- on a mesh, and in another memory -------------------------------------------------------------


def put(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Return what a `device_put` moves, arrays and the codes and scales of weights."""
    params = {name: eqn.params[name] for name in ("devices", "srcs", "copy_semantics")}
    flat: list[Any] = []
    given: dict[str, list[Any]] = {name: [] for name in params}
    for i, x in enumerate(values):
        fields = x.weight.fields if isinstance(x, QuantizedView) else {"": x}
        for field, array in fields.items():
            flat.append(array)
            for name, entries in params.items():
                entry = entries[i]
                if isinstance(x, QuantizedView) and isinstance(entry, NamedSharding):
                    spec = field_specs(x.weight, entry.spec, entry.mesh.shape)[field]
                    entry = entry.update(spec=spec)
                given[name].append(entry)
    moved = iter(jaxprs.bind(eqn, flat, **{name: tuple(x) for name, x in given.items()}))
    return [
        dataclasses.replace(
            x,
            weight=dataclasses.replace(x.weight, fields={f: next(moved) for f in x.weight.fields}),
        )
        if isinstance(x, QuantizedView)
        else next(moved)
        for x in values
    ]


@_move("sharding_constraint")
def _sharding_constraint(eqn: Any, w: QuantizedWeight) -> QuantizedWeight:
    return _bind_with_sharding(eqn, w, "sharding", PartitionSpec.UNCONSTRAINED)


@_move("reshard")
def _reshard(eqn: Any, w: QuantizedWeight) -> QuantizedWeight:
    return _bind_with_sharding(eqn, w, "dst_sharding", None)


def _bind_with_sharding(eqn: Any, w: QuantizedWeight, param: str, other: Any) -> QuantizedWeight:
    wanted = eqn.params[param]
    if not isinstance(wanted, NamedSharding):
        return w
    fields: dict[str, jax.Array] = {}
    for name, spec in field_specs(w, wanted.spec, wanted.mesh.shape, other).items():
        changes: dict[str, Any] = {param: wanted.update(spec=spec)}
        if "unconstrained_dims" in eqn.params:
            free = {i for i, entry in enumerate(spec) if entry is PartitionSpec.UNCONSTRAINED}
            changes["unconstrained_dims"] = frozenset(eqn.params["unconstrained_dims"] | free)
        (fields[name],) = jaxprs.bind(eqn, [w.fields[name]], **changes)
    return dataclasses.replace(w, fields=fields)


@_move("pvary")
def _pvary(eqn: Any, w: QuantizedWeight) -> QuantizedWeight:
    return with_fields(w, lambda x: jaxprs.make_varying(x, eqn.params["axes"]), blocked_axis(w))


@_move("all_gather", "all_gather_invariant")
def _all_gather(eqn: Any, w: QuantizedWeight) -> QuantizedWeight | None:
    at = blocked_axis(w)
    if eqn.params["all_gather_dimension"] == at and any(
        holds_for_all(w, name) for name in w.fields
    ):
        return None  # devices may have different scales for the whole axis
    return with_fields(w, lambda x: jaxprs.bind(eqn, [x])[0], at)


# --- several weights ------------------------------------------------------------------------------


def _joined(eqn: Any, values: Sequence[Any], which: Any) -> QuantizedWeight | None:
    """Return what an equation makes of several weights of one kind; None where they are not."""
    views = values if which is None else values[1:]
    weights = [x.weight for x in views if isinstance(x, QuantizedView) and not x.pending]
    if len(weights) < len(views) or not _are_alike(weights):
        return None
    return JOINS[eqn.primitive.name](eqn, weights, which)


def _are_alike(weights: Sequence[QuantizedWeight]) -> bool:
    """Return whether weights have one kind, block, axis and dtype, and arrays of the same types."""
    sorts = {
        (w.kind, w.axis, w.ndim, jnp.dtype(w.dtype), w.block)
        + tuple(x.dtype for _, x in sorted(w.fields.items()))
        for w in weights
    }
    return len(sorts) == 1


def _concatenate(eqn: Any, weights: Sequence[QuantizedWeight], _: Any) -> QuantizedWeight | None:
    first, dimension = weights[0], eqn.params["dimension"]
    at = blocked_axis(first)
    if dimension == at and any(f.per_weight == 0 for f in first.format.fields.values()):
        return None  # each has one entry for all of its axis
    return _join(weights, lambda xs: lax.concatenate(xs, dimension), at)


def _stack(eqn: Any, weights: Sequence[QuantizedWeight], _: Any) -> QuantizedWeight:
    axis, at = eqn.params["axis"], blocked_axis(weights[0])
    return _join(weights, lambda xs: jaxprs.bind(eqn, xs)[0], at + (axis <= at))


def _select(eqn: Any, weights: Sequence[QuantizedWeight], which: Any) -> QuantizedWeight | None:
    """Select codes and scales; `which` is a scalar, or has size one along the blocked axis."""
    at = blocked_axis(weights[0])
    if which.ndim and which.shape[at] != 1:
        return None

    def select(xs: Sequence[jax.Array]) -> jax.Array:
        chosen = jnp.broadcast_to(which, xs[0].shape) if which.ndim else which
        return lax.select_n(chosen, *xs)

    return _join(weights, select, at)


JOINS |= {"concatenate": _concatenate, "stack": _stack, "select_n": _select}


def _join(
    weights: Sequence[QuantizedWeight], fn: Callable[[Sequence[jax.Array]], jax.Array], at: int
) -> QuantizedWeight:
    """Return the weight whose arrays are `fn` of those of all, with its blocks along axis `at`."""
    first = weights[0]
    fields = {name: fn([w.fields[name] for w in weights]) for name in first.fields}
    return QuantizedWeight(fields, first.kind, at - fields[first.format.codes].ndim, first.dtype)
