"""Adapter files damaged at random: each must give a clear error, or load finite values that fit.

    python -m tests.stress.damaged_files --count 1000 --seed 0
        the same mutations for the same numbers
    python -m tests.stress.damaged_files --number 17 --seed 0
        one of them, and what is said of it

Prints what became of them. Exits with 1 where one came to anything else: another exception, a
warning, values that are not finite or do not fit, something written, a lot of memory or time.
"""

import argparse
import os
import resource
import sys
import time
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.stress.damaged_files import check
from tests.stress.damaged_files.subjects import FORMATS

MEMORY = 2**30  # bytes more than the process has, from which on there is a MemoryError


def memory() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.damaged_files", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many mutations")
    parser.add_argument("--seed", type=int, default=0, help="which mutations")
    parser.add_argument("--number", type=int, help="one mutation alone")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    options = parser.parse_args()
    numbers = range(options.count) if options.number is None else [options.number]
    check.run(options.seed + 1, range(30), options.formats)  # compiles; threads get their stacks
    limit = memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tally = check.run(options.seed, numbers, options.formats)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    if options.number is not None:
        print(*check.mutation(options.seed, options.number, options.formats)[1:], sep="\n")
    report(tally)
    seconds = time.perf_counter() - start
    print(f"\n{len(numbers)} mutations in {seconds:.0f} s, the slowest {tally.slowest:.2f} s; the")
    print(f"process grew by {grown:.0f} MB. {len(tally.problems) or 'None'} gave anything else.")
    return 1 if tally.problems else 0


def report(tally: check.Tally) -> None:
    totals: Counter = Counter()
    for (_, outcome), n in tally.outcomes.items():
        totals[outcome] += n
    for outcome, n in totals.most_common():
        by = ", ".join(f"{format} {tally.outcomes[format, outcome]}" for format in FORMATS)
        print(f"{n:6} {outcome:36} {by}")
    for name, number, how, problem in tally.problems[:20]:
        print(f"\nnumber {number}, {name}, {how}:\n{problem}")


if __name__ == "__main__":
    sys.exit(main())
