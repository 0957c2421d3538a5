"""The Python cost of the transformation: `python -m benchmarks.tracing --help`.

Seconds to trace and lower the plain model, the hand-written one and `lora` of the plain one,
forward and with a gradient; and the time of a compiled call of each where there is next to nothing
to compute.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks import contenders, decoder
from benchmarks.contenders import Setting
from benchmarks.decoder import VARIANTS, Size
from benchmarks.measure import in_turn, median
from benchmarks.report import ratio, versions

TINY = Size(width=16, heads=2, vocabulary=32, batch=1, time=4, rank=2)
CALLS = 200


def losses(setting: Setting) -> dict[str, tuple[Callable, tuple]]:
    """Return the loss of each form and its arguments, the first of which is differentiated."""
    params, batch = setting.params(), setting.batch()

    def bare(x: jax.Array, params: Any, batch: jax.Array) -> jax.Array:
        x = decoder.blocks(x, params["layers"], setting.size.heads, setting.variant)
        return decoder.cross_entropy(params, x, batch[:, 1:])

    base, adapters = lora_jax.split(contenders.adapted(setting))
    return {
        "bare": (bare, (decoder.embed(params, batch[:, :-1]), params, batch)),
        "by hand": (contenders.loss_by_hand(setting), (setting.adapters(), params, batch)),
        "lora": (contenders.loss_split(setting), (adapters, base, batch)),
    }


def lowering(fn: Callable, args: tuple, cold: bool) -> float:
    """Measure the CPU seconds to trace and lower; with `cold`, JAX's caches are empty."""
    if cold:
        jax.clear_caches()
    start = time.process_time()  # one thread: other processes take no part of it
    jax.jit(lambda *args: fn(*args)).lower(*args)
    return time.process_time() - start


def calling(fn: Callable, args: tuple) -> Callable[[], float]:
    """Measure the seconds of one compiled call."""
    compiled = jax.jit(fn)
    jax.block_until_ready(compiled(*args))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            out = compiled(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / CALLS

    return measure


def rows(variant: str, rounds: int) -> list[tuple[str, dict[str, list[float]]]]:
    """Return (what was measured, the seconds of each round by form)."""
    found = []
    forms = losses(Setting(Size(), variant))
    for what, derive in (("forward", lambda fn: fn), ("with gradient", jax.value_and_grad)):
        for cold in (False, True):
            timers = [
                lambda fn=fn, args=args, derive=derive, cold=cold: lowering(derive(fn), args, cold)
                for fn, args in forms.values()
            ]
            times = in_turn(timers, rounds, warm_up=1)
            label = f"trace and lower, {what}" + (", cold" if cold else "")
            found.append((label, dict(zip(forms, times, strict=True))))
    tiny = losses(Setting(TINY, variant))
    times = in_turn([calling(fn, args) for fn, args in tiny.values()], rounds)
    return [*found, ("call, forward, width 16", dict(zip(tiny, times, strict=True)))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="unrolled")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    table = Table(title=f"{options.variant}, median ms of {options.rounds} rounds")
    for heading in ("", "bare", "by hand", "/ bare", "lora", "/ bare"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, times in rows(options.variant, options.rounds):
        cells = [f"{1e3 * median(times['bare']):.2f}"]
        for form in ("by hand", "lora"):
            cells += [f"{1e3 * median(times[form]):.2f}", ratio(times[form], times["bare"])]
        table.add_row(label, *cells)
    table.caption = versions()
    console = Console(width=max(Console().width, 100))  # rich assumes 80 columns in a pipe
    console.print(table)


if __name__ == "__main__":
    main()
