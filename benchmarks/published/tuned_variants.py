"""Variants of LoRA, each at its best learning rate (https://arxiv.org/abs/2602.04998).

"Learning Rate Matters: Vanilla LoRA May Suffice for LLM Fine-tuning" searched rates for ten methods
on language models: all peak within 1 to 2 % of each other, at different rates. Here an MLP learns
even digits from 223 examples; the rate of each variant is the one with the highest accuracy on 334
other digits, and the accuracy that counts is that on the last 334. One example is 0.3 %.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import lora_jax
from benchmarks.published import digits, sweeps
from benchmarks.published.result import Line, Picture, Result, Row

SOURCE = "2602.04998"
RANKS = (2, 8)
RATES = sweeps.doubled(5e-4, 8)
WIDTH, STEPS, SEEDS = 256, 100, 5
ENOUGH = 2.0  # percentage points


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a variant differs from LoRA: in its configuration, and in the runs of its sweep."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    runs: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "LoRA": Variant(),
    "rsLoRA": Variant({"scaling": "rslora"}),
    "DoRA": Variant({"dora": True}),
    "LoRA+": Variant(runs={"b_ratio": 16.0}),
    "gaussian": Variant({"init": "gaussian"}),
    "orthogonal": Variant({"init": "orthogonal"}),
    "OLoRA": Variant({"init": "olora"}),
    "PiSSA": Variant({"init": "pissa"}),
}


def split() -> tuple[digits.Data, digits.Data, digits.Data]:
    """Return even digits to train on (a quarter), to choose rates by, and to test on."""
    rest, train = digits.held_out(digits.even())
    return train, *digits.held_out(rest, 2)


def accuracies(
    variant: Variant, rank: int, rates: Sequence[float], width: int, steps: int, seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies in percent `[rates, seeds]`, to choose by and to report."""
    train, *held_out = split()
    config = lora_jax.LoraConfig(rank=rank, **variant.config)
    runs = lora_jax.grid(learning_rate=rates, seed=range(seeds), **variant.runs)
    base = digits.pretrained((width, width), 0)
    chosen, reported = sweeps.tune(base, runs, config, train, held_out, steps)
    return tuple(100 * x.accuracy.reshape(len(rates), seeds) for x in (chosen, reported))


def of_rank(
    rank: int, rates: Sequence[float], width: int, steps: int, seeds: int
) -> tuple[list[Row], Picture]:
    """Compare all variants at one rank, at their best rates and at LoRA's."""
    found = {
        name: accuracies(variant, rank, rates, width, steps, seeds)
        for name, variant in VARIANTS.items()
    }
    at = {name: int(np.argmax(chosen.mean(1))) for name, (chosen, _) in found.items()}
    best = {name: reported[at[name]] for name, (_, reported) in found.items()}
    means = {name: values.mean() for name, values in best.items()}
    apart = max(means.values()) - min(means.values())
    last = min(means, key=lambda name: means[name])
    common = np.stack([reported.mean(1) for _, reported in found.values()])
    spread = common.max(0) - common.min(0)
    setting = (
        f"digits, MLP of width {width}, odd then even, 223 examples, r={rank}, α=r, Adam, {steps} "
        f"steps, {len(rates)} rates in factors of 2, {seeds} seeds: {len(VARIANTS)} sweeps of "
        f"{len(rates) * seeds}"
    )
    rows = [
        Row(
            f"variants of LoRA, each at its best rate, r={rank}",
            SOURCE,
            setting,
            "within 1 to 2 %",
            f"within {apart:.1f} points: "
            + ", ".join(
                f"{name} {values.mean():.1f} ± {values.std(ddof=1):.1f} at {rates[at[name]]:.1e}"
                for name, values in best.items()
            ),
            bool(apart <= ENOUGH),
            "" if apart <= ENOUGH else f"{last} is {means['LoRA'] - means[last]:.1f} below LoRA",
        ),
        Row(
            f"variants of LoRA, all at one rate, r={rank}",
            SOURCE,
            setting,
            "more apart than when tuned",
            f"{spread[at['LoRA']]:.1f} points at LoRA's best rate; {spread.min():.1f} to "
            f"{spread.max():.1f} at the others",
            bool(spread[at["LoRA"]] > apart),
        ),
    ]
    lines = [Line(name, rates, reported.mean(1), "o-") for name, (_, reported) in found.items()]
    title = f"even digits after odd ones, r={rank}"
    return rows, Picture(
        f"tuned_variants_r{rank}", title, "learning rate", "accuracy, %", lines, "x"
    )


def run(
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = RATES,
    width: int = WIDTH,
    steps: int = STEPS,
    seeds: int = SEEDS,
) -> Result:
    """Measure at each rank."""
    found = [of_rank(rank, rates, width, steps, seeds) for rank in ranks]
    return Result([row for rows, _ in found for row in rows], [picture for _, picture in found])
