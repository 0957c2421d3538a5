"""Random configurations of encoders, vision and speech beside transformers.

    python -m tests.stress.other_configs [bert vit ...] --count 60 --seed 0
    python -m tests.stress.other_configs vit --seed 17 --count 1 --say      one case

It needs torch and transformers beside lora_jax (made with torch 2.13 and transformers 5.24). A case
is a tiny random model of transformers, whose config.json may leave out what is usual. Its outputs
must be those here (1e-4), its files written again equal to the bit, and transformers must compute
the same from them; or one line must say which field of config.json cannot be. Prints what became of
them, what was refused and the problems; exits with 1 where there is one.
"""

import argparse
import collections
import random
import sys
import warnings
from collections.abc import Callable

import transformers

from tests.stress.other_configs import images, speech, texts
from tests.stress.other_configs.check import Case, Outcome, outcome
from tests.stress.other_configs.draw import Draw

#: Family -> what makes a random case of it.
FAMILIES: dict[str, Callable[[Draw], Case]] = {
    "bert": texts.bert,
    "roberta": texts.roberta,
    "xlm-roberta": texts.xlm_roberta,
    "modernbert": texts.modernbert,
    "vit": images.vit,
    "deit": images.deit,
    "siglip": images.siglip,
    "siglip_vision_model": images.siglip_vision,
    "clip": images.clip,
    "clip_vision_model": images.clip_vision,
    "whisper": speech.whisper,
}


def one(family: str, seed: int) -> tuple[Outcome, Draw]:
    """Return what became of one case, and the fields that were not usual."""
    draw = Draw(random.Random(f"{family} {seed}"))
    try:
        return outcome(FAMILIES[family](draw)), draw
    except Exception as error:  # any of ours is a problem, of transformers' a mistake in a table
        return Outcome("raised", f"{type(error).__name__}: {error}"), draw


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="family")
    parser.add_argument("--count", type=int, default=60, help="of each family")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--say", action="store_true", help="print each case")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    problems, refused = 0, collections.Counter[str]()
    for family in given.families or FAMILIES:
        sorts, apart = collections.Counter[str](), 0.0
        for seed in range(given.seed, given.seed + given.count):
            found, draw = one(family, seed)
            sorts[found.sort] += 1
            apart = max(apart, 0 if found.is_problem else found.apart)
            if found.is_problem or given.say:
                print(f"  {family} {seed}: {found.sort}: {found.text} {draw.changed}", flush=True)
            problems += found.is_problem
            refused[f"{family}: {found.text}"] += found.sort == "refused"
        print(f"{family}: {dict(sorts)}, largest difference {apart:.0e}", flush=True)
    for text, count in sorted((+refused).items()):
        print(f"refused {count} times: {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
