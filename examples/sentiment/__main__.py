"""`python -m lora_jax.demo`: fine-tune MiniLM on movie reviews."""

from __future__ import annotations

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
    """The command line."""
    defaults = sentiment.Settings()
    parser = argparse.ArgumentParser(prog="python -m lora_jax.demo", description=__doc__)
    add = parser.add_argument
    add("--steps", type=_positive, default=defaults.steps, help="training steps (%(default)s)")
    add("--rank", type=_positive, default=defaults.rank, help="LoRA's rank (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of the start and the order (%(default)s)")
    add("--out", type=Path, default=Path("demo_output"), help="where files go (%(default)s)")
    add("--train", type=_positive, default=8000, help="reviews to train on (%(default)s)")
    add("--held-out", type=_positive, default=2000, help="reviews to judge by (%(default)s)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status is 1 where a line on stderr says what was wrong."""
    options = parse(arguments)
    report, cache = Report(Console()), assets.cache_directory()
    settings = sentiment.Settings(steps=options.steps, rank=options.rank, seed=options.seed)
    try:
        with report.console.status(f"fetching what is not in {cache} yet"):
            assets.fetch((assets.ENCODER, assets.REVIEWS), cache)
        everything = reviews.read(assets.REVIEWS.directory(cache) / "movie_reviews.txt")
        train, held_out = reviews.split(everything, options.train, options.held_out)
        encoder = assets.ENCODER.directory(cache)
        outcome = sentiment.run(settings, encoder, train, held_out, options.out, report)
    except (assets.AssetError, reviews.ReviewsError, lora.LoraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.table(outcome.rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
