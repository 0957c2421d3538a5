"""Training steps that are timed in turn, so that whatever slows the device slows all alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax

from benchmarks.accelerator.blocks import Contender
from benchmarks.accelerator.size import Size
from benchmarks.measure import median


class Started:
    """A contender with its arrays, compiled and called once."""

    def __init__(self, contender: Contender, size: Size):
        self._state, *self._data = contender.start()
        self._steps = size.steps
        step = jax.jit(contender.step, donate_argnums=0)
        start = time.perf_counter()
        self._step = step.lower(self._state, *self._data).compile()
        self.compile_seconds = time.perf_counter() - start
        self.memory = self._step.memory_analysis()
        self.loss = float(self.call())

    def call(self) -> jax.Array:
        """Take a step, and return its loss."""
        self._state, loss = self._step(self._state, *self._data)
        return loss

    def seconds(self) -> float:
        """Return the seconds of one of several steps in a row."""
        start = time.perf_counter()
        for _ in range(self._steps):
            last = self.call()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / self._steps


class InTurn:
    """Contenders in turn, and each one's time over the first's of the same round."""

    def __init__(self, size: Size, makes: Mapping[str, Callable[[], Contender]]):
        self._size, self._makes = size, makes
        self._found: dict[str, dict[str, Any] | Exception] = {}

    def rows(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Return (name, a function that returns its figures); the first call measures them all."""
        for name in self._makes:
            yield name, partial(self._figures, name)

    def _figures(self, name: str) -> dict[str, Any]:
        self._found = self._found or self._measure()
        found = self._found[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self) -> dict[str, dict[str, Any] | Exception]:
        started: dict[str, Started] = {}
        found: dict[str, dict[str, Any] | Exception] = {}
        for name, make in self._makes.items():
            try:
                if self._size.end and time.monotonic() > self._size.end:
                    raise TimeoutError("no time was left")
                started[name] = Started(make(), self._size)
            except Exception as error:  # whatever it is, the other rows are worth having
                found[name] = error
        seconds: dict[str, list[float]] = {name: [] for name in started}
        for _ in range(2 * self._size.repeats):
            for name, one in started.items():
                seconds[name].append(one.seconds())
        first = seconds.get(next(iter(self._makes)))
        return found | {
            name: self._shown(one, seconds[name], first) for name, one in started.items()
        }

    def _shown(self, one: Started, mine: list[float], first: list[float] | None) -> dict[str, Any]:
        ratios = [x / y for x, y in zip(mine, first, strict=True)] if first else None
        return {
            "ms": 1e3 * median(mine),
            "over_the_first": median(ratios) if ratios else None,
            "tokens_per_second": self._size.tokens / median(mine),
            "argument_MB": one.memory.argument_size_in_bytes / 1e6 if one.memory else None,
            "temp_MB": one.memory.temp_size_in_bytes / 1e6 if one.memory else None,
            "compile_s": one.compile_seconds,
            "loss": one.loss,
        }
