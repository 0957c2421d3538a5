"""A storm of clients: `python -m tests.stress.storm --count 5000`."""

import argparse
import sys
import time

from tests.stress.storm.check import run


def main() -> int:
    """Run the storm, print what happened, and return how many problems there were, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.storm", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="things that clients do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=16, help="at a time")
    args = parser.parse_args()
    start = time.perf_counter()
    report = run(args.count, args.seed, args.clients)
    for (name, status), count in sorted(report.counts.items()):
        print(f"{name:20} {status or 'left':>5} {count:6}")
    for problem in report.problems[:30]:
        print("PROBLEM", problem)
    seconds = time.perf_counter() - start
    print(f"{args.count} deeds, {len(report.problems)} problems, {seconds:.0f} s")
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
