"""Break the package on purpose, one way at a time, and check that the tests notice.

    python -m tests.stress.mutants            every mutant, about a minute each
    python -m tests.stress.mutants scale cast those whose name contains one of the words

Print how many tests fail on each, and which. Exit with 1 if a mutant survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.stress.mutants import MUTANTS
from tests.stress.mutants.mutant import Mutant

ROOT = Path(__file__).parents[3]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-n", "auto"]


def run(mutant: Mutant) -> list[str]:
    """Return the ids of the tests that fail on the mutant."""
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
            out = subprocess.run(
                [*PYTEST, *selection],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            failed += re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", out, re.MULTILINE)
        return failed


def main(words: list[str]) -> int:
    """Run the mutants whose name contains one of the words; without words, all."""
    survivors = 0
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        failed = run(mutant)
        survivors += not failed
        print(f"{mutant.name} ({mutant.file}): {len(failed) or 'NO'} tests failed")
        for name in failed:
            print(f"    {name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
