"""The hypothesis strategy: random programs that are valid by construction, shapes tracked."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.language import Block, Op, Program, Weight

MAX_SIZE, MAX_NDIM = 160, 5
LETTERS = "abcdefghijklmnop"


class Value(NamedTuple):
    """What is known of a value: its shape; a weight's view "w", an activation "x", a number "n"."""

    shape: tuple[int, ...]
    kind: str


class Allowed(NamedTuple):
    """What a block may hold: what JAX cannot differentiate around it is kept out."""

    depth: int = 3  # of blocks in blocks
    while_loop: bool = False
    custom_vjp: bool = True
    numbers: bool = True  # may inner blocks read numbers
    shard_map: bool = True
    exact: bool = True  # compared to the last digits: what rounds by layout is welcome


class Builder:
    """One block in the making."""

    def __init__(self, draw: Callable, values: Sequence[Value], allowed: Allowed):
        self.draw, self.values, self.allowed = draw, list(values), allowed
        self.start = len(self.values)
        self.ops: list[Op] = []

    # --- drawing

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choice(self, items: Sequence[Any]) -> Any:
        return items[self.number(0, len(items) - 1)]

    def chance(self, percent: int) -> bool:
        return self.number(0, 99) >= 100 - percent

    def permutation(self, n: int) -> tuple[int, ...]:
        return tuple(self.draw(st.permutations(range(n)))) if n > 1 else tuple(range(n))

    def subset(self, items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(item for item in items if self.chance(50))

    def find(self, kinds: str, test: Callable[[tuple[int, ...]], bool] = bool) -> int | None:
        """A value of these kinds whose shape passes the test (has an axis, if none is given)."""
        found = [i for i, v in enumerate(self.values) if v.kind in kinds and test(v.shape)]
        return self.choice(found) if found else None

    def shape(self, i: int) -> tuple[int, ...]:
        return self.values[i].shape

    # --- emitting

    def emit(
        self,
        name: str,
        args: Sequence[int],
        params: Sequence[Any],
        *outs: Value,
        blocks: tuple = (),
    ) -> list[int]:
        self.ops.append(Op(name, tuple(args), tuple(params), blocks))
        self.values += outs
        return list(range(len(self.values) - len(outs), len(self.values)))

    def view(self, name: str, i: int, params: Sequence[Any], *shapes: Sequence[int]) -> None:
        fits = all(math.prod(s) <= MAX_SIZE and len(s) <= MAX_NDIM for s in shapes)
        if fits and all(math.prod(s) for s in shapes):
            self.emit(name, [i], params, *(Value(tuple(s), self.values[i].kind) for s in shapes))

    def activation(self, shape: Sequence[int]) -> int:
        """An activation of this very shape."""
        source = self.find("x", lambda s: True)
        source = 0 if source is None else source
        return self.emit("fit", [source], [tuple(shape)], Value(tuple(shape), "x"))[0]

    def read(self) -> int | None:
        """A number, one of the integers' entries."""
        i = self.find("n", lambda s: True)
        if i is None or not self.shape(i):
            return i
        return self.emit("pick", [i], [self.number(0, self.shape(i)[0] - 1)], Value((), "n"))[0]

    def block(self, captures: Sequence[int], outs: Sequence[int]) -> Block:
        return Block(tuple(captures), tuple(self.ops), tuple(outs))

    # --- a block

    def fill(self, steps: int) -> None:
        for _ in range(steps):
            self.choice(STEPS if self.allowed.depth else FLAT_STEPS)(self)
        used = {
            i for op in self.ops for i in (*op.args, *(c for b in op.blocks for c in b.captures))
        }
        loose = [
            i for i, v in enumerate(self.values) if v.kind == "w" and v.shape and i not in used
        ]
        if loose and self.chance(80):
            contraction(self, self.choice(loose[-2:]))

    def outputs(self, n: int) -> list[int]:
        """Up to `n` values to return: the newest activations, at times a weight's view."""
        new = [i for i in range(self.start, len(self.values)) if self.values[i].kind == "x"]
        old = [i for i in range(len(self.values)) if self.values[i].kind == "x"]
        outs = (new or old)[-n:] or [self.activation((2,))]
        view = self.find("w", lambda s: True) if self.chance(12) else None
        return outs if view is None else [*outs, view]

    def inner(self, values: Sequence[Value], **changes: Any) -> "Builder":
        """A block inside this one, filled."""
        allowed = self.allowed._replace(depth=self.allowed.depth - 1, shard_map=False)
        allowed = allowed._replace(**{k: v and getattr(allowed, k) for k, v in changes.items()})
        child = Builder(self.draw, values, allowed)
        child.fill(self.number(1, 3))
        return child

    def captures(self, numbers: bool = True) -> list[int]:
        """Some weights, an activation and perhaps the numbers, for a block inside."""
        found = [self.find("w", lambda s: True) for _ in range(self.number(1, 2))]
        found.append(self.find("x", lambda s: True))
        if numbers and self.allowed.numbers and self.chance(40):
            found.append(self.find("n", lambda s: True))
        return list(dict.fromkeys(i for i in found if i is not None))


# --- views ----------------------------------------------------------------------------------------

Step = Callable[[Builder], None]


def on_weight(kinds: str = "wwx") -> Callable[[Callable[[Builder, int], None]], Step]:
    """A step on one value with an axis; a weight rather than an activation."""

    def wrap(fn: Callable[[Builder, int], None]) -> Step:
        @functools.wraps(fn)
        def step(b: Builder) -> None:
            i = b.find("w" if b.chance(90) else "wx")
            if i is not None:
                fn(b, i)

        return step

    return wrap


@on_weight()
def transpose(b: Builder, i: int) -> None:
    shape = b.shape(i)
    order = b.permutation(len(shape))
    b.view("transpose", i, [order], [shape[k] for k in order])


@on_weight()
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


@on_weight()
def slice_(b: Builder, i: int) -> None:
    bounds = []
    for n in b.shape(i):
        start = b.number(0, n - 1) if b.chance(50) else 0
        stop = b.number(start + 1, n) if b.chance(50) else n
        bounds.append((start, stop, b.choice([1, 1, 2])))
    b.view("slice", i, list(zip(*bounds, strict=True)), [-(-(e - s) // k) for s, e, k in bounds])


@on_weight()
def split(b: Builder, i: int) -> None:
    shape, axis = list(b.shape(i)), b.number(0, len(b.shape(i)) - 1)
    if shape[axis] > 1:
        first = b.number(1, shape[axis] - 1)
        sizes = (first, shape[axis] - first)
        parts = [[*shape[:axis], n, *shape[axis + 1 :]] for n in sizes]
        b.view("split", i, [sizes, axis], *parts)


@on_weight()
def rows(b: Builder, i: int) -> None:
    """`for w in stack`."""
    shape, axis = b.shape(i), b.number(0, len(b.shape(i)) - 1)
    b.view("unstack", i, [axis], *[shape[:axis] + shape[axis + 1 :]] * shape[axis])


@on_weight()
def rev(b: Builder, i: int) -> None:
    b.view("rev", i, [b.subset(range(len(b.shape(i))))], b.shape(i))


@on_weight()
def ones(b: Builder, i: int) -> None:
    """Axes of size one taken away, or put in."""
    shape = b.shape(i)
    gone = b.subset([k for k, n in enumerate(shape) if n == 1])
    if gone:
        b.view("squeeze", i, [gone], [n for k, n in enumerate(shape) if k not in gone])
    elif len(shape) < 4:
        at = b.number(0, len(shape))
        b.view("expand_dims", i, [(at,)], [*shape[:at], 1, *shape[at:]])


@on_weight()
def multiple(b: Builder, i: int) -> None:
    name = b.choice(["multiple", "quotient", "negative"])
    b.view(name, i, [] if name == "negative" else [b.choice([2.0, -0.5, 3.0])], b.shape(i))


@on_weight()
def broadcast(b: Builder, i: int) -> None:
    shape = [b.number(1, 3) if n == 1 and b.chance(50) else n for n in b.shape(i)]
    dims = list(range(len(shape)))
    for _ in range(b.number(0, 2)):
        at = b.number(0, len(shape))
        shape.insert(at, b.number(1, 3))
        dims = [d + (d >= at) for d in dims]
    b.view("broadcast_in_dim", i, [tuple(shape), tuple(dims)], shape)


@on_weight()
def repeat(b: Builder, i: int) -> None:
    shape, axis = list(b.shape(i)), b.number(0, len(b.shape(i)) - 1)
    n, name = b.number(1, 3), b.choice(["repeat", "tile", "roll", "cumsum"])
    if name == "cumsum":
        b.view(name, i, [axis], shape)
    elif name == "roll":
        b.view(name, i, [n, axis], shape)
    else:
        params = (
            [n, axis] if name == "repeat" else [(1,) * axis + (n,) + (1,) * (len(shape) - axis - 1)]
        )
        shape[axis] *= n
        b.view(name, i, params, shape)


@on_weight()
def pad(b: Builder, i: int) -> None:
    widths = tuple((b.number(0, 1), b.number(0, 1)) for _ in b.shape(i))
    b.view("pad", i, [widths], [sum(w) + n for w, n in zip(widths, b.shape(i), strict=True)])


@on_weight()
def altered(b: Builder, i: int) -> None:
    """What is no view: a mask, a square, a bound."""
    name = b.choice(["tril", "square", "tanh"])
    if name != "tril" or len(b.shape(i)) > 1:
        b.view(name, i, [], b.shape(i))


@on_weight()
def same(b: Builder, i: int) -> None:
    b.view("same", i, [b.choice(["copy", "stop_gradient", "barrier", "name"])], b.shape(i))


@on_weight()
def total(b: Builder, i: int) -> None:
    axes = b.subset(range(len(b.shape(i))))
    b.view("sum", i, [axes], [n for k, n in enumerate(b.shape(i)) if k not in axes])


@on_weight()
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


@on_weight()
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


@on_weight()
def scaled_columns(b: Builder, i: int) -> None:
    """`w * s[None, :]`, along any axes, from either side; at times all of them, or a scalar."""
    shape = () if b.chance(15) else tuple(n if b.chance(50) else 1 for n in b.shape(i))
    s = b.activation(shape)
    b.emit("mul", [i, s] if b.chance(50) else [s, i], [], b.values[i])


# --- contractions ---------------------------------------------------------------------------------


def contraction(b: Builder, i: int | None = None) -> None:
    """einsum or dot_general of a weight and an activation, or of any two values."""
    i = b.find("w" if b.chance(90) else "wx") if i is None else i
    if i is None:
        return
    shape = b.shape(i)
    labels = LETTERS[: len(shape)]
    if b.chance(20) and (j := b.find("wx")) is not None:
        others, roles = list(b.shape(j)), dict.fromkeys(labels, "f")
        names: list[str | None] = [None] * len(others)
        for label, size in zip(labels, shape, strict=True):
            free = [k for k, n in enumerate(others) if n == size and names[k] is None]
            if free and b.chance(60):
                names[b.choice(free)] = label
                roles[label] = b.choice("ccb")
    else:
        roles = {label: b.choice("ccccfffbs") for label in labels}
        if len(shape) > 1 and b.chance(85):  # in and out, as a layer has them
            first, second, *_ = b.permutation(len(shape))
            roles |= {labels[first]: "c", labels[second]: "f"}
        shared = [k for k in range(len(shape)) if roles[labels[k]] in "cb"]
        extra = [b.number(1, 3) for _ in range(b.number(0, 2))]
        order = b.permutation(len(shared) + len(extra))
        pairs = [(labels[k], shape[k]) for k in shared] + [(None, n) for n in extra]
        names, others = [pairs[k][0] for k in order], [pairs[k][1] for k in order]
        j = None
    fresh = iter(LETTERS[len(shape) :])
    x_labels = [name or next(fresh) for name in names]
    sizes = dict(zip(labels, shape, strict=True)) | dict(zip(x_labels, others, strict=True))
    kept = [
        n
        for n in (*labels, *(n for n in x_labels if n not in labels))
        if roles.get(n) not in ("c", "s")
    ]
    if math.prod(sizes[n] for n in kept) > MAX_SIZE or len(kept) > MAX_NDIM:
        return
    j = b.activation(others) if j is None else j
    kind = "w" if b.values[j].kind == "w" and not ({"c"} & set(roles.values())) else "x"
    left_is_weight = b.chance(40)
    pairs = [(i, labels), (j, "".join(x_labels))]
    (l, l_names), (r, r_names) = pairs if left_is_weight else pairs[::-1]
    if "s" not in roles.values() and b.chance(40):
        _dot_general(b, (l, l_names), (r, r_names), roles, sizes, kind)
        return
    out = "".join(kept[k] for k in b.permutation(len(kept)))
    b.emit(
        "einsum", [l, r], [f"{l_names},{r_names}->{out}"], Value(tuple(sizes[n] for n in out), kind)
    )


def _dot_general(b: Builder, left: Any, right: Any, roles: Any, sizes: Any, kind: str) -> None:
    (l, l_names), (r, r_names) = left, right
    summed = [n for n in l_names if n in r_names and roles[n] == "c"]
    batch = [n for n in l_names if n in r_names and roles[n] == "b"]
    summed = [summed[k] for k in b.permutation(len(summed))]
    batch = [batch[k] for k in b.permutation(len(batch))]
    at = lambda names, wanted: tuple(names.index(n) for n in wanted)
    numbers = tuple((at(l_names, ns), at(r_names, ns)) for ns in (summed, batch))
    out = [
        *batch,
        *(n for names in (l_names, r_names) for n in names if n not in (*summed, *batch)),
    ]
    b.emit("dot_general", [l, r], [numbers], Value(tuple(sizes[n] for n in out), kind))


def convolution(b: Builder) -> None:
    """A convolution over one or two axes with any order of axes, groups, strides, dilations."""
    i = b.find("w", lambda s: len(s) in (3, 4))
    if i is None:
        return
    shape, letters = b.shape(i), "HW"[4 - len(b.shape(i)) :]
    shuffled = lambda names: "".join(names[k] for k in b.permutation(len(names)))
    kernel, lhs, out = shuffled("IO" + letters), shuffled("NC" + letters), shuffled("NC" + letters)
    sizes = dict(zip(kernel, shape, strict=True))
    groups = b.choice([1, 1, 2, sizes["O"]])
    groups = groups if sizes["O"] % groups == 0 else 1
    strides, lhs_dilation, rhs_dilation = (
        tuple(b.choice([1, 1, 2]) for _ in letters) for _ in range(3)
    )
    padding = tuple((b.number(0, 2), b.number(0, 1)) for _ in letters)
    x_sizes = {"N": b.number(1, 2), "C": sizes["I"] * groups}
    out_sizes = {"N": x_sizes["N"], "C": sizes["O"]}
    for k, n in enumerate(letters):
        span = (sizes[n] - 1) * rhs_dilation[k] + 1
        x_sizes[n] = b.number(1, 2) + span
        room = (x_sizes[n] - 1) * lhs_dilation[k] + 1 + sum(padding[k])
        out_sizes[n] = (room - span) // strides[k] + 1
    new = tuple(out_sizes[n] for n in out)
    if math.prod(new) > MAX_SIZE or math.prod(x_sizes.values()) > MAX_SIZE:
        return
    x = b.activation([x_sizes[n] for n in lhs])
    options = (padding, strides, lhs_dilation, rhs_dilation, groups)
    b.emit("convolution", [x, i], [(lhs, kernel, out), options], Value(new, "x"))


def ragged_dot(b: Builder) -> None:
    i = b.find("w", lambda s: len(s) == 3)
    if i is not None:
        groups, k, n = b.shape(i)
        sizes = tuple(b.number(0, 2) for _ in range(groups))
        rows = max(1, sum(sizes))
        x = b.activation((rows, k))
        b.emit("ragged_dot", [x, i], [sizes], Value((rows, n), "x"))


def activate(b: Builder) -> None:
    i = b.find("x", lambda s: True)
    if i is not None:
        b.emit(b.choice(["tanh", "sin"]), [i], [], b.values[i])


def whole(b: Builder) -> None:
    """Every entry of a weight with every entry of a constant table."""
    i = b.find("w", lambda s: True)
    if i is not None:
        shape = tuple(b.number(1, 3) for _ in range(b.number(0, 2)))
        b.emit("fit", [i], [shape], Value(shape, "x"))


# --- containers -----------------------------------------------------------------------------------


def enclosed(b: Builder) -> None:
    """jit or remat around a block, which closes over its values or is passed them."""
    name, captures = b.choice(["jit", "remat"]), b.captures()
    child = b.inner([b.values[i] for i in captures])
    outs = child.outputs(b.number(1, 2))
    results = [child.values[i] for i in outs]
    if name == "remat":
        policy = b.choice([None, "nothing_saveable", "dots_saveable", "everything_saveable"])
        params = [b.chance(40), policy, b.chance(70)]
    else:
        closed = b.chance(30)
        alike = [[j for j, v in enumerate(b.values) if v == b.values[i]] for i in captures]
        again = tuple(b.choice(found) for found in alike) if b.chance(30) and not closed else ()
        params = [closed, again]
        results = results * 2 if again else results
    b.emit(name, [], params, *results, blocks=(child.block(captures, outs),))


def vmap(b: Builder) -> None:
    """Stacked weights, stacked activations or both; any axis in, any axis out."""
    captures = b.captures()
    lead = b.choice(captures)
    if not b.shape(lead):
        return
    size = b.choice(b.shape(lead))
    in_axes: list[int | None] = []
    for i in captures:
        axes = [k for k, n in enumerate(b.shape(i)) if n == size]
        mapped = axes and (i == lead or b.chance(60))
        in_axes.append(b.choice(axes) if mapped else None)
    values = [
        v if at is None else v._replace(shape=v.shape[:at] + v.shape[at + 1 :])
        for v, at in zip((b.values[i] for i in captures), in_axes, strict=True)
    ]
    child = b.inner(values)
    outs = child.outputs(b.number(1, 2))
    results, out_axes = [], []
    for i in outs:
        at = b.number(0, len(child.shape(i)))
        out_axes.append(at)
        shape = child.shape(i)
        results.append(child.values[i]._replace(shape=(*shape[:at], size, *shape[at:])))
    block = child.block(captures, outs)
    b.emit("vmap", [], [tuple(in_axes), tuple(out_axes)], *results, blocks=(block,))


def scan(b: Builder) -> None:
    """Weights closed over, carried along (untouched or changed) and scanned, in any mixture."""
    captures, lead = b.captures(), b.find("wwx")
    if lead is None:
        return
    length = b.shape(lead)[0]
    alike = [i for i, v in enumerate(b.values) if v.shape and v.shape[0] == length and i != lead]
    xs = [lead, *b.subset(alike[-3:])] if b.chance(80) else []
    hidden = b.activation(tuple(b.number(1, 3) for _ in range(b.number(0, 2))))
    carried = b.find("w") if b.chance(25) else None
    carry = [hidden] if carried is None else [hidden, carried]
    slices = [b.values[i]._replace(shape=b.shape(i)[1:]) for i in xs]
    operands = [*(b.values[i] for i in (*captures, *carry)), *slices]
    child = b.inner(operands)
    first = len(captures)
    outs = child.outputs(2)
    moved = child.emit("fold", [first, outs[-1]], [], b.values[hidden])
    if carried is not None:
        changes = b.chance(20)
        kept = (
            child.emit("multiple", [first + 1], [0.5], b.values[carried])
            if changes
            else [first + 1]
        )
        moved += kept
    ys = outs if b.chance(60) else []
    ys = [i for i in ys if math.prod(child.shape(i)) * length <= MAX_SIZE]
    results = [b.values[i] for i in carry]
    results += [child.values[i]._replace(shape=(length, *child.shape(i))) for i in ys]
    block = child.block(captures, [*moved, *ys])
    params = [len(carry), length, b.chance(40), b.choice([1, 1, 2])]
    b.emit("scan", [*carry, *xs], params, *results, blocks=(block,))


def while_loop(b: Builder) -> None:
    number = b.read() if b.allowed.while_loop else None
    if number is None:
        return
    captures = b.captures()
    hidden = b.activation(tuple(b.number(1, 3) for _ in range(b.number(0, 2))))
    carried = b.find("w") if b.chance(40) else None
    carry = [hidden] if carried is None else [hidden, carried]
    values = [b.values[i] for i in (*captures, *carry)]
    child, test = b.inner(values), b.inner(values)
    first = len(captures)
    moved = child.emit("fold", [first, child.outputs(1)[0]], [], b.values[hidden])
    moved += [first + 1] if carried is not None else []
    tested = test.emit("fit", [test.outputs(1)[0]], [(2,)], Value((2,), "x"))
    blocks = (child.block(captures, moved), test.block(captures, tested))
    b.emit("while_loop", [number, *carry], [], *(b.values[i] for i in carry), blocks=blocks)


def switch(b: Builder) -> None:
    number = b.read()
    if number is None:
        return
    shape = tuple(b.number(1, 3) for _ in range(b.number(0, 2)))
    passed = b.find("w") if b.chance(25) else None
    alike = [i for i, v in enumerate(b.values) if passed is not None and v == b.values[passed]]
    blocks = []
    for _ in range(b.number(2, 3)):
        captures = b.captures()
        if passed is not None:
            captures = [*captures, b.choice(alike) if b.chance(30) else passed]
        child = b.inner([b.values[i] for i in captures])
        outs = child.emit("fit", [child.outputs(1)[0]], [shape], Value(shape, "x"))
        outs += [len(captures) - 1] if passed is not None else []
        blocks.append(child.block(captures, outs))
    results = [Value(shape, "x")] + ([b.values[passed]] if passed is not None else [])
    b.emit("switch", [number], [b.chance(40)], *results, blocks=tuple(blocks))


def derivative(b: Builder) -> None:
    """jax.grad or jax.jvp inside the program, by an activation or by a weight."""
    captures, name = b.captures(), b.choice(["grad", "grad", "jvp"])
    changes = {"while_loop": False} if name == "grad" else {"custom_vjp": False}
    child = b.inner([b.values[i] for i in captures], **changes)
    outs = child.outputs(1)
    floats = [k for k, i in enumerate(captures) if b.values[i].kind != "n"]
    if name == "grad":
        positions = b.subset(floats) or (floats[-1],)
        results = [b.values[captures[k]]._replace(kind="x") for k in positions]
        params: list[Any] = [positions]
    else:
        params = [b.choice(floats)]
        results = [child.values[i] for i in outs] + [
            child.values[i]._replace(kind="x") for i in outs
        ]
    b.emit(name, [], params, *results, blocks=(child.block(captures, outs),))


def custom(b: Builder) -> None:
    """custom_jvp or custom_vjp with a rule that is not the true derivative."""
    name = b.choice(["custom_jvp", "custom_vjp"])
    if name == "custom_vjp" and not b.allowed.custom_vjp:
        return
    captures = b.captures(numbers=False)
    changes = {"while_loop": False} if name == "custom_vjp" else {"custom_vjp": False}
    child = b.inner([b.values[i] for i in captures], numbers=False, **changes)
    outs = child.outputs(b.number(1, 2))
    results = [child.values[i]._replace(kind="x") for i in outs]
    b.emit(name, [], [], *results, blocks=(child.block(captures, outs),))


def shard_map(b: Builder) -> None:
    if not b.allowed.shard_map:
        return
    captures = b.captures()
    in_axes: list[int | None] = []
    for i in captures:
        even = [k for k, n in enumerate(b.shape(i)) if n % 2 == 0 and b.values[i].kind != "n"]
        in_axes.append(b.choice(even) if even and b.chance(60) else None)
    values = [
        v
        if at is None
        else v._replace(shape=tuple(n // 2 if k == at else n for k, n in enumerate(v.shape)))
        for v, at in zip((b.values[i] for i in captures), in_axes, strict=True)
    ]
    child = b.inner(values)
    outs = child.emit("fit", [child.outputs(1)[0]], [(1, 2)], Value((1, 2), "x"))
    block = child.block(captures, outs)
    b.emit("shard_map", [], [tuple(in_axes)], Value((2, 2), "x"), blocks=(block,))


VIEWS: list[Step] = [
    *[transpose, reshape, slice_, take] * 3,
    *[split, rows, rev, ones, multiple, broadcast, same, total, window] * 2,
    *[together] * 4,
    *[scaled_columns, repeat] * 2,
    *[pad, altered],
]
CONTRACTIONS: list[Step] = [*[contraction] * 16, *[convolution] * 2, *[ragged_dot] * 2, whole]
BLOCKS: list[Step] = [
    *[enclosed, vmap, scan, scan] * 3,
    *[switch, derivative, custom, while_loop] * 2,
    shard_map,
]


def one_of(steps: Sequence[Step]) -> Step:
    return lambda b: b.choice(steps)(b)


FLAT_STEPS: list[Step] = [
    *[one_of(VIEWS)] * 10,
    *[one_of(CONTRACTIONS)] * 6,
    *[activate] * 2,
]
STEPS: list[Step] = [*FLAT_STEPS, *[one_of(BLOCKS)] * 4]


# --- programs -------------------------------------------------------------------------------------


def _layout(draw: Callable, ndim: int) -> str:
    """A random layout, with an in and an out axis at least."""
    letters = draw(st.lists(st.sampled_from("iob"), min_size=ndim, max_size=ndim))
    at = draw(st.permutations(range(ndim)))
    letters[at[0]], letters[at[1]] = "i", "o"
    return "".join(letters)


def _weight(draw: Callable) -> Weight:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    if len(shape) == 1:
        return Weight(shape, adapted=False)
    dtype = draw(st.sampled_from(["float64"] * 3 + ["float32"]))
    fallback = _layout(draw, len(shape))
    named = draw(st.integers(0, 9)) >= 7
    return Weight(shape, dtype, layout=fallback if named else None, fallback=fallback)


@st.composite
def programs(draw: Callable, max_steps: int = 6) -> Program:
    """Programs of up to `max_steps` operations (a few more in blocks), one adapted weight at least."""
    matrix = Weight(tuple(draw(st.integers(1, 4)) for _ in range(2)), fallback="io")
    weights = [matrix] + [_weight(draw) for _ in range(draw(st.integers(0, 2)))]
    inputs = [(draw(st.integers(1, 3)), matrix.shape[0])]
    inputs += [tuple(draw(st.lists(st.integers(1, 3), max_size=3)))] if draw(st.booleans()) else []
    forward = draw(st.integers(0, 9)) == 9
    values = [Value(w.shape, "w") for w in weights] + [Value(shape, "x") for shape in inputs]
    allowed = Allowed(while_loop=forward, custom_vjp=not forward)
    b = Builder(draw, [*values, Value((4,), "n")], allowed)
    b.fill(draw(st.integers(1, max_steps)))
    read = {
        i for op in b.ops for i in (*op.args, *(c for block in op.blocks for c in block.captures))
    }
    for i, weight in enumerate(weights):
        if weight.adapted and i not in read and b.chance(80):
            contraction(b, i)
    block = b.block(range(len(values) + 1), b.outputs(3))
    return Program(
        weights=tuple(weights),
        inputs=tuple(inputs),
        block=block,
        rank=draw(st.integers(1, 2)),
        reverse=not forward,
        compute="bfloat16" if draw(st.integers(0, 19)) == 19 else "float64",
        seed=draw(st.integers(0, 99)),
    )
