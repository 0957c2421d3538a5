"""Random programs through the engine: adapted must equal merged, in outputs and gradients.

    python -m tests.stress.fuzz --count 10000 --seed 0        the same programs for the same numbers
    python -m tests.stress.fuzz --rows                        as batches with many adapters
    python -m tests.stress.fuzz --program "Program(...)"      one program, as a failure prints it

Prints how many ran and how fast, what `init` declined, which primitives needed the whole weight,
and the mismatches, each sort with a program that shows it, made small. Exits with 1 where there is
one.
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=2"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

from tests.stress.fuzz import campaign, language
from tests.stress.fuzz.campaign import CHUNK, Tally
from tests.stress.fuzz.rows import check_rows


def run(
    count: int, seed: int, workers: int, shrink: int, folder: str, checked: campaign.Check
) -> tuple[Tally, list]:
    """Chunks of programs over processes; `shrink` sorts of failure are made small."""
    starts: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in range(0, count, CHUNK):
        starts.put(start)

    def lane() -> Tally:
        total, process = Tally(), Process(folder)
        with contextlib.suppress(queue.Empty):
            while True:
                start = starts.get_nowait()
                total += process.tally(seed, start, min(start + CHUNK, count), checked)
        return total

    with ThreadPoolExecutor(workers) as threads:
        tallies = [threads.submit(lane) for _ in range(workers)]
        total = sum((t.result() for t in tallies), Tally())
    process = Process(folder)
    groups = [found for found in _by_sort(total.problems) if found[0][1] is not None]
    small = [
        process.call(campaign.smallest, seed, found[0][0], checked) for found in groups[:shrink]
    ]
    return total, small


class Process:
    """A process for programs, replaced by another where XLA brings it down."""

    def __init__(self, folder: str):
        self._folder = folder
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, campaign.configure, (self._folder,))

    def call(self, fn: Callable, *args: Any) -> Any:
        """What `fn(*args)` returns there, or None where the process ended."""
        try:
            return self._pool.submit(fn, *args).result()
        except BrokenProcessPool:
            self._start()
            return None

    def tally(self, seed: int, start: int, stop: int, checked: campaign.Check) -> Tally:
        """What became of some programs, the one that ends a process found by halving them."""
        tally = self.call(campaign.chunk, seed, start, stop, checked)
        if tally is not None:
            return tally
        if stop - start > 1:
            middle = (start + stop) // 2
            return self.tally(seed, start, middle, checked) + self.tally(
                seed, middle, stop, checked
            )
        if self.call(campaign.plain, seed, start) is None:
            return Tally(1, skipped=Counter(["XLA ends the process"]))
        return Tally(1, problems=[(start, None, "XLA ends the process, on the adapted form alone")])


def _by_sort(problems: list[campaign.Problem]) -> list[list[campaign.Problem]]:
    """Problems whose messages differ in numbers alone stand together."""
    groups: dict[str, list[campaign.Problem]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"[\d.]+(e-?\d+)?", "", problem[2]), []).append(problem)
    return list(groups.values())


def report(tally: Tally, shrunk: Sequence[tuple], seconds: float) -> None:
    print(f"{tally.run} programs in {seconds:.0f} s ({tally.run / seconds:.1f} a second)")
    print(f"{tally.quantized} have quantized weights")
    print(f"{tally.dense_programs} made a weight dense:{_lines(tally.dense)}")
    print(f"init declined:{_lines(tally.declined)}")
    if tally.skipped:
        print(f"JAX itself does not run:{_lines(tally.skipped)}")
    for k, group in enumerate(_by_sort(tally.problems)):
        program, problem = (k < len(shrunk) and shrunk[k]) or group[0][1:]
        print(f"\nprograms {', '.join(str(i) for i, _, _ in group[:10])}: {problem}\n{program}")
    print(f"\n{len(tally.problems) or 'no'} mismatches")


def _lines(counter: Counter) -> str:
    return "".join(f"\n  {n:6} {name}" for name, n in counter.most_common()) or " nothing"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="which programs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--shrink", type=int, default=3, help="how many failures to make small")
    parser.add_argument(
        "--rows", action="store_true", help="as batches whose rows use different adapters"
    )
    parser.add_argument("--program", help="run one program, as a failure prints it")
    options = parser.parse_args()
    checked = check_rows if options.rows else campaign.check_both_ways
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.program:
            campaign.configure(folder)
            tally, shrunk = Tally(), []
            program = eval(options.program, vars(language))
            tally.note(0, program, checked(program))
        else:
            tally, shrunk = run(
                *(options.count, options.seed, options.workers, options.shrink, folder, checked)
            )
    report(tally, shrunk, time.perf_counter() - start)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
