"""Break the package on purpose, one way at a time, and check that the tests notice.

    python -m tests.stress.mutants            every mutant, about half a minute each
    python -m tests.stress.mutants scale models/decoder
        those whose name or file contains one of the words
    python -m tests.stress.mutants --quick    only until the first test fails on each

Print how many tests fail on each, and which. Exit with 1 if a mutant survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.stress.mutants import MUTANTS
from tests.stress.mutants.mutant import Mutant

ROOT = Path(__file__).parents[3]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]


def run(mutant: Mutant, quick: bool = False) -> list[str]:
    """Return the ids of the tests that fail on the mutant, if `quick` only the first one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("lora_jax", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "lora_jax" / mutant.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: its text is not in {mutant.file} exactly once; update the mutant"
            )
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        failed = []
        for selection in mutant.selections:
            done = subprocess.run(
                [*PYTEST, *["-x"] * quick, *selection],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode not in (0, 1):  # no test was found, or none could be collected
                raise SystemExit(f"{mutant.name}: {' '.join(selection)}:\n{done.stdout[-2000:]}")
            failed += re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
            if failed and quick:
                break
        return failed


def main(words: list[str], jobs: int, quick: bool) -> int:
    """Run the mutants whose name or file contains one of the words; without words, all."""
    chosen = [m for m in MUTANTS if not words or any(x in m.name or x in m.file for x in words)]
    survivors = 0
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(partial(run, quick=quick), chosen)
        for mutant, failed in zip(chosen, found, strict=True):
            survivors += not failed
            print(f"{mutant.name} ({mutant.file}): {len(failed) or 'NO'} tests failed", flush=True)
            for name in failed:
                print(f"    {name}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.stress.mutants")
    parser.add_argument("words", nargs="*", help="in names or files of mutants; all without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--quick", action="store_true", help="stop at the first failing test")
    options = parser.parse_args()
    sys.exit(main(options.words, options.jobs or 1, options.quick))
