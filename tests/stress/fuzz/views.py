"""Steps that view a weight, put weights together or alter them."""

import math
from typing import Any

import numpy as np

from tests.stress.fuzz.builder import MAX_NDIM, MAX_SIZE, Builder, Step, Value, on_weight


@on_weight
def transpose(b: Builder, i: int) -> None:
    shape = b.shape(i)
    order = b.permutation(len(shape))
    b.view("transpose", i, [order], [shape[k] for k in order])


@on_weight
def reshape(b: Builder, i: int) -> None:
    factors = [p for n in b.shape(i) for p in ([2, 2] if n == 4 else [n] if n > 1 else [])]
    new = [1] if b.chance(20) else []
    for factor in factors:
        if new and b.chance(40):
            new[-1] *= factor
        else:
            new.append(factor)
    if b.chance(15):
        new.insert(b.number(0, len(new)), 1)
    b.view("reshape", i, [tuple(new), "F" if b.chance(15) else "C"], new)


@on_weight
def slice_(b: Builder, i: int) -> None:
    bounds = []
    for n in b.shape(i):
        start = b.number(0, n - 1) if b.chance(50) else 0
        stop = b.number(start + 1, n) if b.chance(50) else n
        bounds.append((start, stop, b.choice([1, 1, 2])))
    b.view("slice", i, list(zip(*bounds, strict=True)), [-(-(e - s) // k) for s, e, k in bounds])


@on_weight
def split(b: Builder, i: int) -> None:
    shape, axis = list(b.shape(i)), b.number(0, len(b.shape(i)) - 1)
    if shape[axis] > 1:
        first = b.number(1, shape[axis] - 1)
        sizes = (first, shape[axis] - first)
        parts = [[*shape[:axis], n, *shape[axis + 1 :]] for n in sizes]
        b.view("split", i, [sizes, axis], *parts)


@on_weight
def rows(b: Builder, i: int) -> None:
    """`for w in stack`."""
    shape, axis = b.shape(i), b.number(0, len(b.shape(i)) - 1)
    b.view("unstack", i, [axis], *[shape[:axis] + shape[axis + 1 :]] * shape[axis])


@on_weight
def rev(b: Builder, i: int) -> None:
    b.view("rev", i, [b.subset(range(len(b.shape(i))))], b.shape(i))


@on_weight
def ones(b: Builder, i: int) -> None:
    """Axes of size one taken away, or put in."""
    shape = b.shape(i)
    gone = b.subset([k for k, n in enumerate(shape) if n == 1])
    if gone:
        b.view("squeeze", i, [gone], [n for k, n in enumerate(shape) if k not in gone])
    elif len(shape) < 4:
        at = b.number(0, len(shape))
        b.view("expand_dims", i, [(at,)], [*shape[:at], 1, *shape[at:]])


@on_weight
def multiple(b: Builder, i: int) -> None:
    name = b.choice(["multiple", "quotient", "negative"])
    b.view(name, i, [] if name == "negative" else [b.choice([2.0, -0.5, 3.0])], b.shape(i))


@on_weight
def broadcast(b: Builder, i: int) -> None:
    shape = [b.number(1, 3) if n == 1 and b.chance(50) else n for n in b.shape(i)]
    dims = list(range(len(shape)))
    for _ in range(b.number(0, 2)):
        at = b.number(0, len(shape))
        shape.insert(at, b.number(1, 3))
        dims = [d + (d >= at) for d in dims]
    b.view("broadcast_in_dim", i, [tuple(shape), tuple(dims)], shape)


@on_weight
def repeat(b: Builder, i: int) -> None:
    shape, axis = list(b.shape(i)), b.number(0, len(b.shape(i)) - 1)
    n, name = b.number(1, 3), b.choice(["repeat", "tile", "roll", "cumsum"])
    if name == "cumsum":
        b.view(name, i, [axis], shape)
    elif name == "roll":
        b.view(name, i, [n, axis], shape)
    else:
        reps = tuple(n if k == axis else 1 for k in range(len(shape)))
        params = [n, axis] if name == "repeat" else [reps]
        shape[axis] *= n
        b.view(name, i, params, shape)


@on_weight
def pad(b: Builder, i: int) -> None:
    widths = tuple((b.number(0, 1), b.number(0, 1)) for _ in b.shape(i))
    b.view("pad", i, [widths], [sum(w) + n for w, n in zip(widths, b.shape(i), strict=True)])


@on_weight
def altered(b: Builder, i: int) -> None:
    """What is no view: a mask, a square, a bound."""
    name = b.choice(["tril", "square", "tanh"])
    if name != "tril" or len(b.shape(i)) > 1:
        b.view(name, i, [], b.shape(i))


@on_weight
def same(b: Builder, i: int) -> None:
    b.view("same", i, [b.choice(["copy", "stop_gradient", "barrier", "name"])], b.shape(i))


@on_weight
def total(b: Builder, i: int) -> None:
    axes = b.subset(range(len(b.shape(i))))
    b.view("sum", i, [axes], [n for k, n in enumerate(b.shape(i)) if k not in axes])


@on_weight
def take(b: Builder, i: int) -> None:
    """Entries by constant or by given numbers, in every mode; `w[:, i]`; take_along_axis."""
    shape, axis = b.shape(i), b.number(0, len(b.shape(i)) - 1)
    way = b.choice(["constant", "numbers", "index", "along"])
    mode, negative = b.choice(["fill", "clip", "wrap"]), b.chance(30)
    negative = negative and mode != "clip"
    if way == "along":
        n = b.number(1, 3)
        ids = np.arange(n).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        ids = np.broadcast_to(ids, [n if k == axis else m for k, m in enumerate(shape)])
        ids = (ids + np.indices(ids.shape).sum(0)) % shape[axis]
        b.view("take_along_axis", i, [_nested(ids), axis], ids.shape)
    elif way == "constant":
        ids_shape = b.choice([(), (1,), (2,), (3,), (2, 2)])
        ids = np.array([b.number(-1, 4) for _ in range(math.prod(ids_shape))]).reshape(ids_shape)
        new = [*shape[:axis], *ids_shape, *shape[axis + 1 :]]
        b.view("take_constant", i, [_nested(ids), axis, mode, negative], new)
    elif (n := b.find("n", lambda s: True)) is not None:
        rest = [*shape[:axis], *b.shape(n), *shape[axis + 1 :]]
        if math.prod(rest) > MAX_SIZE or len(rest) > MAX_NDIM:
            return
        if way == "index":
            b.emit("index", [i, n], [axis, negative], Value(tuple(rest), b.values[i].kind))
        else:
            b.emit("take", [i, n], [axis, mode, negative], Value(tuple(rest), b.values[i].kind))


def _nested(ids: np.ndarray) -> Any:
    tuples = lambda x: tuple(map(tuples, x)) if isinstance(x, list) else x
    return tuples(ids.tolist())


@on_weight
def window(b: Builder, i: int) -> None:
    """dynamic_slice, and its opposite."""
    shape, n = b.shape(i), b.read()
    if n is None:
        return
    axes = b.subset(range(len(shape)))
    sizes = tuple(b.number(1, s) if k in axes else s for k, s in enumerate(shape))
    if b.chance(85):
        b.emit("dynamic_slice", [i, n], [axes, sizes], Value(sizes, b.values[i].kind))
    else:
        part = b.activation((1, *shape[1:]))
        b.emit("update_slice", [i, part, n], [], b.values[i])


def together(b: Builder) -> None:
    """Concatenate, stack, add or select: weights with weights, or with activations."""
    i = b.find("w")
    if i is None:
        return
    name, shape = b.choice(["concatenate", "stack", "add", "select"]), b.shape(i)
    axis = b.number(0, len(shape) - 1)
    rest = lambda s: (
        len(s) == len(shape)
        and all(m == n for k, (m, n) in enumerate(zip(s, shape, strict=True)) if k != axis)
    )
    same = rest if name == "concatenate" else lambda s: s == shape
    j = b.activation(shape) if b.chance(25) else b.find("w", same)
    items = [i, j] if b.chance(70) else [j, i]
    n = b.read() if name == "select" else None
    if name == "concatenate":
        items += [items[0]] if b.chance(20) else []
        size = sum(b.shape(k)[axis] for k in items)
        new, params = (*shape[:axis], size, *shape[axis + 1 :]), [axis]
    elif name == "stack":
        new, params = (*shape[:axis], 2, *shape[axis:]), [axis]
    else:
        new, params = shape, []
        if name == "select" and n is None:
            return
        items = [n, *items] if name == "select" else items
    if math.prod(new) <= MAX_SIZE and len(new) <= MAX_NDIM:
        b.emit(name, items, params, Value(tuple(new), "w"))


@on_weight
def scaled_columns(b: Builder, i: int) -> None:
    """`w * s[None, :]`, along any axes, from either side; at times all of them, or a scalar."""
    shape = () if b.chance(15) else tuple(n if b.chance(50) else 1 for n in b.shape(i))
    s = b.activation(shape)
    b.emit("mul", [i, s] if b.chance(50) else [s, i], [], b.values[i])


STEPS: list[Step] = [
    *[transpose, reshape, slice_, take] * 3,
    *[split, rows, rev, ones, multiple, broadcast, same, total, window] * 2,
    *[together] * 4,
    *[scaled_columns, repeat] * 2,
    *[pad, altered],
]
