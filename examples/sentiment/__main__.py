"""`python -m examples.sentiment`: fine-tune MiniLM on movie reviews."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import lora_jax as lora
from examples.sentiment import reviews, sentiment
from examples.sentiment.report import Report
from lora_jax.models import assets


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = sentiment.Recipe()
    parser = argparse.ArgumentParser(prog="python -m examples.sentiment", description=__doc__)
    add = parser.add_argument
    add("--steps", type=_positive, default=defaults.steps, help="training steps (%(default)s)")
    add("--rank", type=_positive, default=defaults.rank, help="LoRA rank (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="random seed (%(default)s)")
    add("--out", type=Path, default=Path("demo_output"), help="output directory (%(default)s)")
    add("--train", type=_positive, default=8000, help="number of training reviews (%(default)s)")
    add("--held-out", type=_positive, default=2000, help="number of test reviews (%(default)s)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. The exit status is 1 where a line on stderr says what went wrong."""
    options = parse(arguments)
    report, cache = Report(Console()), assets.cache_directory()
    recipe = sentiment.Recipe(steps=options.steps, rank=options.rank, seed=options.seed)
    try:
        with report.console.status(f"downloading what is not yet in {cache}"):
            assets.fetch((assets.ENCODER, assets.REVIEWS), cache)
        everything = reviews.read(assets.REVIEWS.directory(cache) / "movie_reviews.txt")
        train, held_out = reviews.split(everything, options.train, options.held_out)
        encoder = assets.ENCODER.directory(cache)
        scores = sentiment.run(recipe, encoder, train, held_out, options.out, report)
    except (assets.AssetError, lora.LoraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.table(scores.rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
