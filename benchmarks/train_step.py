"""A training step of each contender, in turn: `python -m benchmarks.train_step --help`."""

import argparse
import dataclasses
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import OF_JAX, Setting
from benchmarks.decoder import VARIANTS, Size
from benchmarks.measure import Program, Stepper, in_turn, median
from benchmarks.report import ratio, versions

TRACES = 5
#: Contenders without adapters; their loss is that of the base.
BARE = ("a", "e")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="unrolled")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--only", default="", help="letters of contenders, such as a,b,h")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    console = Console(width=max(Console().width, 124))  # rich assumes 80 columns in a pipe
    wanted = set(filter(None, args.only.split(",")))
    setting = Setting(Size(), args.variant)
    steppers, left_out = start(setting, wanted)
    check_losses(steppers)
    rows = measure(steppers, args.rounds)
    console.print(table(f"one training step, {args.variant}, median of {args.rounds} rounds", rows))
    for line in left_out:
        console.print(line)
    for stepper in steppers:
        stepper.close()


def start(setting: Setting, wanted: set[str]) -> tuple[list[Any], list[str]]:
    """Start the requested contenders that are installed, with a line for each that is not."""

    def is_wanted(key: str) -> bool:
        return not wanted or key in wanted

    steppers: list[Any] = [
        Stepper(c) for c in (make(setting) for make in OF_JAX) if is_wanted(c.key)
    ]
    left_out = []
    if is_wanted("f"):
        try:
            from benchmarks import with_qwix

            steppers.append(Stepper(with_qwix.contender(setting)))
        except ImportError as error:
            left_out.append(f"left out: f, qwix ({error})")
    if is_wanted("g"):
        from benchmarks import with_peft

        if with_peft.is_installed():
            steppers.append(with_peft.Peft(setting))
        else:
            left_out.append("left out: g, PEFT (torch and peft are not both installed)")
    return sorted(steppers, key=lambda s: s.key), left_out


def check_losses(steppers: list[Any]) -> None:
    """Check that all compute the same function: otherwise a comparison would mean nothing."""
    for group in (True, False):
        losses = {s.key: s.first_loss for s in steppers if (s.key in BARE) == group}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"the first losses differ: {losses}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for one contender; one in another process has no `program`."""

    key: str
    label: str
    seconds: list[float]  # per round
    call: float  # median seconds until the jitted call is back in Python
    program: Program | None
    trace: float | None  # median seconds to trace and lower


def measure(steppers: list[Any], rounds: int) -> list[Row]:
    """Run all contenders in turn."""
    ours = [s for s in steppers if isinstance(s, Stepper)]
    traces = in_turn([s.trace for s in ours], TRACES, warm_up=1)
    trace = {s.key: median(times) for s, times in zip(ours, traces, strict=True)}
    steps = in_turn([s.step for s in steppers], rounds)
    return [
        Row(
            stepper.key,
            stepper.label,
            [total for total, _ in times],
            median([call for _, call in times]),
            stepper.program() if stepper in ours else None,
            trace.get(stepper.key),
        )
        for stepper, times in zip(steppers, steps, strict=True)
    ]


def table(title: str, rows: list[Row]) -> Table:
    """Return the figures, one row per contender."""
    made = Table(title=title, caption=versions("flax", "optax", "qwix", "torch", "peft"))
    for heading in ("", "contender"):
        made.add_column(heading)
    for heading in ("ms", "/ a", "/ b", "GFLOP", "temp MB", "trace ms", "/ a", "call ms"):
        made.add_column(heading, justify="right")
    by_key = {row.key: row for row in rows}
    bare = by_key["a"].trace if "a" in by_key else None
    for row in rows:
        made.add_row(
            row.key,
            row.label,
            f"{1e3 * median(row.seconds):.1f}",
            *(ratio(row.seconds, by_key[k].seconds) if k in by_key else "" for k in "ab"),
            f"{row.program.flops / 1e9:.2f}" if row.program else "",
            f"{row.program.temporary_bytes / 1e6:.1f}" if row.program else "",
            f"{1e3 * row.trace:.0f}" if row.trace else "",
            f"{row.trace / bare:.2f}" if row.trace and bare else "",
            "" if math.isnan(row.call) else f"{1e3 * row.call:.2f}",
        )
    return made


if __name__ == "__main__":
    main()
