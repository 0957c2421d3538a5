"""One training step of each contender, in turn: `python -m benchmarks.train_step --help`."""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import rich.table
from rich.console import Console

from benchmarks.contenders import OF_JAX, Contender, Setting
from benchmarks.decoder import VARIANTS, Size
from benchmarks.measure import Program, Stepper, in_turn, median

TRACES = 5


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="unrolled")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--only", default="", help="letters of contenders, such as a,b,h")
    return parser.parse_args()


def versions() -> str:
    """The machine and the packages that were measured."""
    names = ("jax", "jaxlib", "flax", "optax", "qwix", "torch", "peft")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(found)}"


def main() -> None:
    """Measure and print."""
    args = arguments()
    console = Console(width=max(Console().width, 124))  # a pipe would be told 80
    wanted = set(filter(None, args.only.split(",")))
    setting = Setting(Size(), args.variant)
    contenders = [make(setting) for make in OF_JAX]
    steppers = [Stepper(c) for c in contenders if not wanted or c.key in wanted]
    programs = [s.program() for s in steppers]
    traces = [median(ts) for ts in in_turn([s.trace for s in steppers], TRACES, warm_up=1)]
    steps = in_turn([s.step for s in steppers], args.rounds)
    console.print(table(args.variant, args.rounds, steppers, programs, traces, steps))


def table(
    variant: str,
    rounds: int,
    steppers: list[Stepper],
    programs: list[Program],
    traces: list[float],
    steps: list[list[tuple[float, float]]],
) -> rich.table.Table:
    """The figures, a row for each contender."""
    seconds = [[total for total, _ in rounds] for rounds in steps]
    calls = [median([call for _, call in rounds]) for rounds in steps]
    keys = [s.key for s in steppers]
    made = rich.table.Table(
        title=f"one training step, {variant}, median of {rounds} rounds", caption=versions()
    )
    for heading in ("", "contender"):
        made.add_column(heading)
    for heading in ("ms", "/ a", "/ b", "GFLOP", "temp MB", "trace ms", "/ a", "call ms"):
        made.add_column(heading, justify="right")
    for i, (stepper, program) in enumerate(zip(steppers, programs, strict=True)):
        made.add_row(
            stepper.key,
            stepper.label,
            f"{1e3 * median(seconds[i]):.1f}",
            ratio(seconds, keys, i, "a"),
            ratio(seconds, keys, i, "b"),
            f"{program.flops / 1e9:.2f}",
            f"{program.temporary_bytes / 1e6:.1f}",
            f"{1e3 * traces[i]:.0f}",
            f"{traces[i] / traces[keys.index('a')]:.2f}" if "a" in keys else "",
            f"{1e3 * calls[i]:.2f}",
        )
    return made


def ratio(seconds: list[list[float]], keys: list[str], i: int, to: str) -> str:
    """The median over the rounds of one contender's time over another's in the same round."""
    if to not in keys:
        return ""
    pairs = zip(seconds[i], seconds[keys.index(to)], strict=True)
    return f"{median([mine / other for mine, other in pairs]):.3f}"


if __name__ == "__main__":
    main()
