"""The best learning rate over the rank, for three scales: a grid of ranks, rates and seeds.

LoRA Without Regret (https://thinkingmachines.ai/blog/lora/) has one best rate for all ranks with a
scale of α/r. Maximal-Update Adaptation (https://arxiv.org/abs/2602.06204) says in its abstract that
it depends on initialization and scale: in one regime the best rate is invariant across ranks, in
another it falls inversely with the rank. Only that abstract was at hand. So which scale gives which
regime was derived here: a step of Adam moves each entry of A and B by about the rate η, so ΔW moves
by s·r·η at first, while A is still where it started, and by s·r·η² later. For a scale s of α/r both
are independent of r; for a scale of 1, η should fall as r^-1 or r^-0.5.
"""

from collections.abc import Sequence

import numpy as np

import lora_jax
from benchmarks.published import digits, sweeps
from benchmarks.published.result import HeatMap, Line, Picture, Result, Row

RANKS = (1, 4, 16, 64)
RATES = sweeps.doubled(2e-4, 11)
WIDTH, STEPS, SEEDS = 256, 30, 3
FLAT = 0.15  # an exponent that is called invariant
BLOG, PAPER = "https://thinkingmachines.ai/blog/lora/", "2602.06204"
# The three agree at rank 16, where all scales are 2.
ALPHAS = {
    "α/r": lambda rank: 32.0,
    "α/√r": lambda rank: 8.0 * rank**0.5,
    "constant": lambda rank: 2.0 * rank,
}


def losses(
    scale: str, ranks: Sequence[int], rates: Sequence[float], width: int, steps: int, seeds: int
) -> np.ndarray:
    """Return held-out losses `[ranks, rates]` of one sweep, medians over seeds.

    The hidden kernels are adapted, so that the whole ΔW has the rank.
    """
    train, test = digits.held_out(digits.even())
    runs = [
        lora_jax.Run(rank=rank, alpha=ALPHAS[scale](rank), learning_rate=rate, seed=seed)
        for rank in ranks
        for rate in rates
        for seed in range(seeds)
    ]
    config = lora_jax.LoraConfig(exclude=["layer_2"])
    base = digits.pretrained((width, width), 0)
    (found,) = sweeps.tune(base, runs, config, train, [test], steps)
    return np.median(found.loss.reshape(len(ranks), len(rates), seeds), 2)


def of_full(rates: Sequence[float], width: int, steps: int, seeds: int) -> float:
    """Return the best rate of full fine-tuning of the same kernels."""
    train, test = digits.held_out(digits.even())
    config = lora_jax.LoraConfig(targets=(), train=["layer_0/kernel", "layer_1/kernel"])
    base = digits.pretrained((width, width), 0)
    runs = lora_jax.grid(learning_rate=rates, seed=range(seeds))
    (found,) = sweeps.tune(base, runs, config, train, [test], steps)
    return sweeps.best(np.median(found.loss.reshape(len(rates), seeds), 1), rates)


def run(
    ranks: Sequence[int] = RANKS,
    rates: Sequence[float] = RATES,
    width: int = WIDTH,
    steps: int = STEPS,
    seeds: int = SEEDS,
) -> Result:
    """Measure the three scales, and full fine-tuning for the ratio."""
    found = {scale: losses(scale, ranks, rates, width, steps, seeds) for scale in ALPHAS}
    rate_of = {name: [sweeps.best(row, rates) for row in table] for name, table in found.items()}
    powers = {name: sweeps.power(ranks, values) for name, values in rate_of.items()}
    full = of_full(rates, width, steps, seeds)
    setting = (
        f"digits, MLP of width {width}, odd then even, Adam, {steps} steps, {len(rates)} rates in "
        f"factors of 2, {seeds} seeds, r={','.join(map(str, ranks))}: one sweep of "
        f"{len(ranks) * len(rates) * seeds}"
    )
    show = lambda name: (
        f"r^{powers[name]:z.2f}: " + ", ".join(f"{rate:.1e}" for rate in rate_of[name])
    )
    low, high = min(rate_of["α/r"]), max(rate_of["α/r"])
    tenfold = all(5 <= rate / full <= 20 for rate in rate_of["α/r"])
    falls = -1.25 <= powers["constant"] <= -0.75
    rows = [
        Row(
            "best learning rate over the rank, in one sweep",
            BLOG,
            setting,
            "nearly independent of the rank with α/r",
            f"{show('α/r')}; within a factor of {high / low:.3g}",
            high / low <= 2,
        ),
        Row(
            "best learning rate, LoRA over full, in one sweep",
            BLOG,
            setting,
            "about 10",
            ", ".join(f"{rate / full:.3g}" for rate in sorted(set(rate_of["α/r"]))),
            tenfold,
            "" if tenfold else "the networks are narrow, see the row by width",
        ),
        Row(
            "regime of the invariant rate: scale α/r",
            PAPER,
            setting,
            "r^0 (which scale: derived here)",
            show("α/r"),
            abs(powers["α/r"]) <= FLAT,
        ),
        Row(
            "regime of the falling rate: constant scale",
            PAPER,
            setting,
            "r^-1 (which scale: derived here)",
            f"{show('constant')}; with α/√r {show('α/√r')}",
            falls,
            "" if falls else "it falls, and more slowly: as the term s·r·η² of ΔW asks for",
        ),
    ]
    maps = [
        HeatMap(
            f"rank_and_rate_{name}",
            f"even digits after odd ones, scale: {label}",
            ("learning rate", [f"{rate:.1e}" for rate in rates]),
            ("rank", [str(rank) for rank in ranks]),
            found[label],
            "held-out loss",
        )
        for name, label in (("standard", "α/r"), ("rslora", "α/√r"), ("constant", "constant"))
    ]
    lines = [Line(f"scale {name}", ranks, values, "o-") for name, values in rate_of.items()]
    lines.append(Line("full fine-tuning", ranks, [full] * len(ranks), "k--"))
    title = "best learning rate over the rank"
    picture = Picture("rank_and_rate", title, "rank", "best learning rate", lines, "xy")
    return Result(rows, [*maps, picture])
