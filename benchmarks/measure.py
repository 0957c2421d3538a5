"""Time contenders in turn, and read what XLA says about their programs."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.contenders import Contender

WARM_UP = 2  # rounds that do not count


@dataclasses.dataclass(frozen=True)
class Program:
    """Exact figures: XLA's own, for a compiled step."""

    flops: float
    temporary_bytes: int


class Stepper:
    """A contender ready to run: compiled, with one step taken."""

    def __init__(self, contender: Contender):
        self.label, self.key = contender.label, contender.key
        self._make = contender.make
        self._step = jax.jit(contender.make(), donate_argnums=0)
        # A copy, since another contender may donate the same arrays.
        self._state, *self._data = jax.tree.map(jax.numpy.copy, contender.start())
        self._shapes = jax.eval_shape(lambda *args: args, self._state, *self._data)
        self.first_loss = self.loss()

    def loss(self) -> float:
        """Take a step, and return the loss before it."""
        self._state, loss = self._step(self._state, *self._data)
        return float(loss)

    def program(self) -> Program:
        """Return what XLA says about the step."""
        # Already compiled: the arguments are those of the first call.
        compiled = self._step.lower(self._state, *self._data).compile()
        return Program(
            compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
        )

    def trace(self) -> float:
        """Measure the seconds to trace and lower a function that JAX has not seen."""
        fresh = jax.jit(self._make(), donate_argnums=0)
        gc.collect()  # a full collection takes as long as a trace; it would meet one or another
        start = time.perf_counter()
        fresh.lower(*self._shapes)
        return time.perf_counter() - start

    def step(self) -> tuple[float, float]:
        """Measure the seconds of one step, and those until the call returned to Python."""
        start = time.perf_counter()
        self._state, loss = self._step(self._state, *self._data)
        returned = time.perf_counter()
        jax.block_until_ready((self._state, loss))
        return time.perf_counter() - start, returned - start

    def close(self) -> None:
        """Do nothing: the contender runs in this process."""


def in_turn(functions: Sequence[Callable[[], Any]], rounds: int, warm_up: int = WARM_UP) -> list:
    """Call functions in turn, and return `rounds` values for each.

    They run one after another, round by round, so whatever slows the machine slows all alike.
    """
    results = [[f() for f in functions] for _ in range(warm_up + rounds)][warm_up:]
    return [list(values) for values in zip(*results, strict=True)]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
