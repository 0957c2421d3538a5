"""Random configurations of the decoders beside transformers.

    python -m tests.stress.decoder_configs --count 20 --seed 0       of each family
    python -m tests.stress.decoder_configs --family llama --only 7   one, with its config.json

It needs torch and transformers beside lora_jax (made with torch 2.13 and transformers 5.24). Each
tiny random model is saved by transformers, its config.json rewritten as older versions and authors
write it, and loaded by both: logits at several lengths, greedy tokens, layers in a scan, and the
files that are saved again must be equal, or an error name the field that is not supported. Prints
what became of them; exits with 1 where something differs.
"""

import argparse
import collections
import json
import os
import sys
import time
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
import transformers

from tests.stress.decoder_configs.check import outcome
from tests.stress.decoder_configs.draw import FAMILIES


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--count", type=int, default=5, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one configuration")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    numbers = range(options.count) if options.only is None else [options.only]
    problems = 0
    for family in options.family or FAMILIES:
        counts: collections.Counter[str] = collections.Counter()
        largest, start, refusals = 0.0, time.perf_counter(), collections.Counter[str]()
        for number in numbers:
            found = outcome(family, f"{options.seed}.{number}")
            counts[found.sort] += 1
            largest = max(largest, found.apart if found.sort == "equal" else 0)
            if found.sort.startswith("refused"):
                refusals[f"{found.sort}: {found.text[:200]}"] += 1
            if found.is_problem or options.only is not None:
                config = found.about.pop("config", "")
                print(f"  {family} --only {number}: {found.sort}: {found.text}")
                print(f"    {json.dumps(found.about)}", config if options.only is not None else "")
            problems += found.is_problem
        seconds = time.perf_counter() - start
        print(f"{family}: {dict(counts)}, at most {largest:.1e} apart, {seconds:.0f} s", flush=True)
        for text, count in refusals.items():
            print(f"    {count} x {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
