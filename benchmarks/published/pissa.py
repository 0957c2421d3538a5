"""PiSSA against LoRA (https://arxiv.org/abs/2404.02948, figure 2): faster, and to a lower loss.

The setup of the figure: a two-layer MLP learns odd digits, then adapters tune it on even ones. The
sizes are those of the authors' script: a hidden layer of 128, Adam at 5e-4, 200 epochs of
pre-training and 100 of tuning. Their rank is 8, which for ten outputs is nearly full, so lower
ranks are measured too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import lora_jax
from benchmarks.published import digits
from benchmarks.published.result import Line, Picture, Result, Row

RANKS = (8, 4, 2)
RATES = tuple(5e-4 * 2.0**k for k in range(9))
SOURCE = "2404.02948"
WIDTHS = (128,)
TURNS = (
    "in the end, not at first, probably because B starts along the few directions that tell odd "
    "digits apart and has to turn"
)


def configs(rank: int) -> dict[str, lora_jax.LoraConfig | None]:
    """Return LoRA, PiSSA and full fine-tuning by name; the scale is 1, as in the paper."""
    return {
        "LoRA": lora_jax.LoraConfig(rank=rank),
        "PiSSA": lora_jax.LoraConfig(rank=rank, init="pissa"),
        "full": None,
    }


def curve(config: Any, rate: float, steps: int, every: int, seeds: int, epochs: int) -> np.ndarray:
    """Return the loss on all even digits during training, the median over seeds."""
    data = digits.even()
    return np.median(
        [
            digits.tune(
                digits.pretrained(WIDTHS, seed, epochs),
                data,
                data,
                jax.random.key(seed),
                rate,
                config=config,
                steps=steps,
                every=every,
            )
            for seed in range(seeds)
        ],
        axis=0,
    )


def reached(losses: np.ndarray, level: float, every: int) -> int:
    """Return the first watched step at which the loss is at most `level`."""
    return int(np.argmax(losses <= level)) * every


def at_one_rate(ranks: Sequence[int], steps: int, every: int, seeds: int, epochs: int) -> Result:
    """Reproduce the figure: the same learning rate for all."""
    rows, pictures = [], []
    for rank in ranks:
        losses = {
            name: curve(config, 5e-4, steps, every, seeds, epochs)
            for name, config in configs(rank).items()
        }
        lora, pissa = losses["LoRA"], losses["PiSSA"]
        agrees = bool((pissa[1:] < lora[1:]).all())
        rows.append(
            Row(
                f"PiSSA against LoRA, r={rank}",
                SOURCE,
                f"digits, MLP 64-{WIDTHS[0]}-10, odd then even, Adam at 5e-4, {steps} steps, "
                f"{seeds} seeds",
                "a lower loss with the same number of steps",
                f"after {steps // 4}, {steps // 2}, {steps} steps: PiSSA "
                + ", ".join(f"{pissa[i]:.3g}" for i in quarters(lora))
                + "; LoRA "
                + ", ".join(f"{lora[i]:.3g}" for i in quarters(lora))
                + f"; PiSSA has LoRA's last loss after {reached(pissa, lora[-1], every)}",
                agrees,
                "" if agrees else TURNS,
            )
        )
        times = np.arange(len(lora)) * every
        lines = [Line(name, times, values) for name, values in losses.items()]
        title = f"even digits after odd ones, r={rank}, all at 5e-4"
        pictures.append(
            Picture(f"pissa_r{rank}", title, "step", "loss, median of seeds", lines, "y")
        )
    return Result(rows, pictures)


def quarters(losses: np.ndarray) -> tuple[int, int, int]:
    """Return the indices at which a quarter, half and all of the steps are done."""
    last = len(losses) - 1
    return last // 4, last // 2, last


def at_best_rates(rank: int, rates: Sequence[float], steps: int, seeds: int, epochs: int) -> Row:
    """Measure each at its best learning rate, which the figure does not look for."""
    final = {
        name: [curve(config, rate, steps, steps, seeds, epochs)[-1] for rate in rates]
        for name, config in configs(rank).items()
        if config
    }
    best = {name: (min(values), rates[int(np.nanargmin(values))]) for name, values in final.items()}
    agrees = bool(best["PiSSA"][0] < best["LoRA"][0])
    return Row(
        f"PiSSA against LoRA, r={rank}, each at its best rate",
        SOURCE,
        f"the same, {steps} steps, {seeds} seeds, rates from {rates[0]:.0e} to {rates[-1]:.0e} in "
        "factors of 2",
        "not in the figure",
        "; ".join(f"{name} {loss:.2g} at {rate:.1e}" for name, (loss, rate) in best.items()),
        agrees,
        ""
        if agrees
        else "with its best rate LoRA is ahead; 2602.04998 found rates to be most of "
        "such gains in language models",
    )


def run() -> Result:
    """Measure at one rate, then at the best ones."""
    epochs = 100 * (len(digits.even().labels) // digits.BATCH)
    found = at_one_rate(RANKS, steps=epochs - epochs % 20, every=20, seeds=5, epochs=200)
    return Result([*found.rows, at_best_rates(4, RATES, 300, 3, 200)], found.pictures)
