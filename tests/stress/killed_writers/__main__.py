"""Writers killed at random moments must leave either the old or the new, complete.

    python -m tests.stress.killed_writers --count 100
        100 kills of each kind of writer
    python -m tests.stress.killed_writers --count 20 --kinds training
        of a training run alone, resumed each time
    python -m tests.stress.killed_writers --count 20
        --command lora-jax train --model tiny --data FILE --out {out}

Prints how many were killed and what was found torn. Exits with 1 where something was.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.stress.killed_writers import check, writers

TRAINING = "training"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.killed_writers", description=__doc__.split("\n")[0]
    )
    kinds = [*writers.KINDS, TRAINING]
    parser.add_argument("--count", type=int, default=100, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0, help="which moments")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="a training run, with {out}")
    options = parser.parse_args()
    problems = []
    for kind in ["command"] if options.command else options.kinds:
        began, kills = time.perf_counter(), options.count
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if kind == "command":
                found, kills = check.command(options.command, folder, options.count, options.seed)
            elif kind == TRAINING:
                found, kills = check.training(folder, options.count, options.seed)
            else:
                found = check.saves(kind, folder / "saved", options.count, options.seed)
        seconds = time.perf_counter() - began
        print(f"{kind}: {kills} kills, {len(found)} problems, {seconds:.0f} s", flush=True)
        problems += found
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
