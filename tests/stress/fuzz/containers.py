"""Steps that hold blocks: jit, remat, vmap, loops, branches, derivatives, devices."""

import math
from typing import Any

from tests.stress.fuzz.builder import MAX_SIZE, Builder, Step, Value
from tests.stress.fuzz.contractions import contraction


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
    captures, lead = b.captures(), b.find("wx")
    if b.chance(70):  # stacked layers
        stacks = b.find("w", lambda s: len(s) > 2)
        lead = lead if stacks is None else stacks
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
    if slices and slices[0].kind == "w" and slices[0].shape and b.chance(60):
        contraction(child, first + len(carry))
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


STEPS: list[Step] = [
    *[enclosed, vmap, scan, scan] * 3,
    *[switch, derivative, custom, while_loop] * 2,
    shard_map,
]
