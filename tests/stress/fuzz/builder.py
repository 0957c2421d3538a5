"""One block in the making: drawing, and adding operations whose shapes are known."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.stress.fuzz.language import Block, Op

MAX_SIZE, MAX_NDIM = 160, 5


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


class Grammar(NamedTuple):
    """The steps to choose from, and the one that contracts a value which nothing reads."""

    steps: Sequence["Step"]
    flat_steps: Sequence["Step"]  # those without blocks, for the innermost one
    contract: Callable[["Builder", int], None]


class Builder:
    """One block in the making."""

    def __init__(self, draw: Callable, values: Sequence[Value], allowed: Allowed, grammar: Grammar):
        self.draw, self.values, self.allowed = draw, list(values), allowed
        self.grammar = grammar
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
            deep = self.allowed.depth > 0
            self.choice(self.grammar.steps if deep else self.grammar.flat_steps)(self)
        used = self.used()
        loose = [i for i, v in enumerate(self.values) if v.kind == "w" and v.shape]
        loose = [i for i in loose if i not in used]
        if loose and self.chance(80):
            self.grammar.contract(self, self.choice(loose[-2:]))

    def used(self) -> set[int]:
        """The values that some operation reads, in a block of its own or not."""
        inner = {i for op in self.ops for block in op.blocks for i in block.captures}
        return inner | {i for op in self.ops for i in op.args}

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
        child = Builder(self.draw, values, allowed, self.grammar)
        child.fill(self.number(1, 3))
        return child

    def captures(self, numbers: bool = True) -> list[int]:
        """Some weights, an activation and perhaps the numbers, for a block inside."""
        found = [self.find("w", lambda s: True) for _ in range(self.number(1, 2))]
        found.append(self.find("x", lambda s: True))
        if numbers and self.allowed.numbers and self.chance(40):
            found.append(self.find("n", lambda s: True))
        return list(dict.fromkeys(i for i in found if i is not None))


Step = Callable[[Builder], None]


def on_weight(fn: Callable[[Builder, int], None]) -> Step:
    """A step on one value with an axis; a weight rather than an activation."""

    @functools.wraps(fn)
    def step(b: Builder) -> None:
        i = b.find("w" if b.chance(90) else "wx")
        if i is not None:
            fn(b, i)

    return step
