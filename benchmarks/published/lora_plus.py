"""LoRA+ against LoRA (https://arxiv.org/abs/2402.12354): B learns 16 times as fast as A.

The paper trains language models "up to ~2X" faster. Here both tune a wide MLP on real digits, each
at every learning rate of a grid; what counts is the steps to a given loss at the best one.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import optax

import lora_jax
from benchmarks.published import digits
from benchmarks.published.result import Line, Picture, Result, Row

RATES = tuple(1e-5 * 2.0**k for k in range(3, 12))
RATIO = 16
SOURCE = "2402.12354"


def plus(learning_rate: jax.Array, params: object) -> optax.GradientTransformation:
    """Return LoRA+ with Adam; `learning_rate` is that of A."""
    return lora_jax.lora_plus(learning_rate, params, ratio=RATIO, optimizer=optax.adam)


def steps_to(
    optimizer: digits.Optimizer,
    rates: Sequence[float],
    width: int,
    level: float,
    steps: int,
    every: int,
    seeds: int,
) -> np.ndarray:
    """Return the steps until the loss on all even digits is `level`, per rate; infinity if never.

    Medians over seeds.
    """
    data = digits.even()
    run = partial(
        digits.tune,
        config=lora_jax.LoraConfig(rank=8, alpha=16),
        steps=steps,
        every=every,
        optimizer=optimizer,
    )

    def first(seed: int, rate: float) -> float:
        base = digits.pretrained((width, width), seed)
        below = np.asarray(run(base, data, data, jax.random.key(seed), rate)) <= level
        return float(np.argmax(below)) * every if below.any() else np.inf

    return np.array([np.median([first(seed, rate) for seed in range(seeds)]) for rate in rates])


def run(
    rates: Sequence[float] = RATES,
    width: int = 512,
    level: float = 0.1,
    steps: int = 200,
    every: int = 2,
    seeds: int = 3,
) -> Result:
    """Measure the steps to a loss of 0.1."""
    both = {"LoRA": digits.adam, f"LoRA+, ratio {RATIO}": plus}
    counts = {
        name: steps_to(optimizer, rates, width, level, steps, every, seeds)
        for name, optimizer in both.items()
    }
    (lora, lora_at), (faster, faster_at) = (
        (values.min(), rates[int(values.argmin())]) for values in counts.values()
    )
    row = Row(
        f"LoRA+ against LoRA, steps to a loss of {level}",
        SOURCE,
        f"digits, MLP of width {width}, odd then even, r=8, α=16, Adam, ratio {RATIO}, the best of "
        f"{len(rates)} rates each, {seeds} seeds",
        "up to 2 times faster",
        f"{lora / faster:.2f} times: {faster:.0f} steps at {faster_at:.1e} (A), {lora:.0f} at "
        f"{lora_at:.1e}",
        bool(lora / faster > 1.05),
    )
    lines = [Line(name, rates, values, "o-") for name, values in counts.items()]
    title = f"even digits after odd ones: steps to a loss of {level}"
    picture = Picture("lora_plus", title, "learning rate of A", "steps", lines, "xy")
    return Result([row], [picture])
