"""Steps that contract a weight: einsum, dot_general, convolutions, ragged_dot."""

import math
from typing import Any

from tests.stress.fuzz.builder import MAX_NDIM, MAX_SIZE, Builder, Step, Value

LETTERS = "abcdefghijklmnop"


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


STEPS: list[Step] = [*[contraction] * 16, *[convolution] * 2, *[ragged_dot] * 2, whole]
