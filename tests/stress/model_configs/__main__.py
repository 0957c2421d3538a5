"""Random configurations of all models beside transformers.

    python -m tests.stress.model_configs --count 20 --seed 0    20 of each family
    python -m tests.stress.model_configs llama --only 7         one, with its configuration

It needs torch and transformers beside lora_jax (made with torch 2.13 and transformers 5.24). Each
tiny random model is saved by transformers, its config.json shortened or rewritten as older versions
and authors write it, and loaded by both: results (1e-4), layers in a scan, greedy tokens of
decoders, and the files that are saved again must be equal, or one line name the field that is not
supported. Prints what became of them; exits with 1 where something differs.
"""

import argparse
import collections
import os
import sys
import time
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
import transformers

from tests.stress.model_configs import decoders, others
from tests.stress.model_configs.outcome import Outcome

FAMILIES = {
    **dict.fromkeys(decoders.FAMILIES, decoders.outcome),
    **dict.fromkeys(others.FAMILIES, others.outcome),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="family")
    parser.add_argument("--count", type=int, default=5, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one configuration")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    numbers = range(options.count) if options.only is None else [options.only]
    problems = 0
    for family in options.families or FAMILIES:
        start = time.perf_counter()
        found = {n: FAMILIES[family](family, f"{options.seed}.{n}") for n in numbers}
        report(family, found, time.perf_counter() - start, options.only is not None)
        problems += sum(x.is_problem for x in found.values())
    return 1 if problems else 0


def report(family: str, found: dict[int, Outcome], seconds: float, in_full: bool) -> None:
    """Print what became of a family's configurations: counts, refusals and problems."""
    for number, x in found.items():
        if x.is_problem or in_full:
            print(f"  {family} --only {number}: {x.sort}: {x.text}\n    {x.about}")
    counts = collections.Counter(x.sort for x in found.values())
    apart = max((x.apart for x in found.values() if x.sort == "equal"), default=0)
    print(f"{family}: {dict(counts)}, at most {apart:.1e} apart, {seconds:.0f} s", flush=True)
    said = (f"{x.sort}: {x.text[:200]}" for x in found.values() if x.sort.startswith("refused"))
    for text, count in collections.Counter(said).items():
        print(f"    {count} x {text}")


if __name__ == "__main__":
    sys.exit(main())
