"""Files damaged at random: each must give a clear error, or load what is finite and fits.

    python -m tests.stress.damaged_files --count 2000 --seed 0
        so many files for each reader; the same files for the same numbers
    python -m tests.stress.damaged_files --readers "GGUF model" --number 17
        one of them, and what is said of it

Prints what became of them by reader. Exits with 1 where one came to anything else: another
exception, a warning, values that are not finite or do not fit, something written, more than 50 MB
beside the file's own size, more than 5 seconds, or the end of the process.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.stress.damaged_files import check, readers, workers


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.damaged_files", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many files for each reader")
    parser.add_argument("--seed", type=int, default=0, help="which files")
    parser.add_argument("--number", type=int, help="one file alone, of one reader")
    names = list(readers.READERS)
    parser.add_argument("--readers", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    if options.number is not None:
        return _one(options.seed, options.number, options.readers)
    problems = 0
    for reader in options.readers:
        problems += _report(reader, options.seed, options.count)
    print(f"\n{problems or 'None'} of {options.count * len(options.readers):,} gave anything else.")
    return 1 if problems else 0


def _report(reader: str, seed: int, count: int) -> int:
    """Read `count` files, and print what became of them."""
    start, tally = time.perf_counter(), check.Tally()
    for result in workers.results(seed, range(count), [reader]):
        tally.add(result)
    seconds = time.perf_counter() - start
    print(
        f"{reader}: {count:,} files in {seconds:.0f} s, the slowest {tally.slowest[reader]:.2f} s; "
        f"at most {tally.grown[reader] / 2**20:.0f} MB; {len(tally.problems)} problems"
    )
    for (_, outcome), n in tally.outcomes.most_common():
        print(f"{n:8} {outcome}")
    for x in tally.problems[:20]:
        print(f"\n    number {x.number}, {x.name}, {x.how}: {x.outcome}\n{x.problem!a}")
    sys.stdout.flush()
    return len(tally.problems)


def _one(seed: int, number: int, among: list[str]) -> int:
    reader, name, files, how = check.mutation(seed, number, among)
    tally = check.run(seed, [number], among)
    print(reader, name, how, *(f"{n}: {x[:1500]!r}" for n, x in files.items()), sep="\n")
    print(tally.outcomes, *(x.problem for x in tally.problems), sep="\n")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
