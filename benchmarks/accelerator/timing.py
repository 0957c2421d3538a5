"""Time a contender, and give its memory back."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.accelerator.blocks import Contender
from benchmarks.accelerator.size import Size


def seconds_per_call(call: Callable[[], Any], repeats: int, steps: int) -> float:
    """Return the median over `repeats` of the seconds of one of `steps` calls in a row.

    The first call, which compiles, does not count. The device is waited for once per repeat.
    """
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            last = call()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / steps)
    return statistics.median(found)


def time_step(contender: Contender, size: Size) -> dict[str, Any]:
    """Compile a contender's step and take it; return its figures."""
    state, *data = contender.start()
    step = jax.jit(contender.step, donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, *data).compile()
    compile_seconds = time.perf_counter() - start

    def call() -> Any:
        nonlocal state
        state, loss = compiled(state, *data)
        return loss

    seconds = seconds_per_call(call, size.repeats, size.steps)
    memory = compiled.memory_analysis()
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": size.tokens / seconds,
        "temp_MB": memory.temp_size_in_bytes / 1e6 if memory else None,
        "compile_s": compile_seconds,
        "loss": float(call()),
    }
