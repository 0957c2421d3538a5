"""LoRA Without Regret: the best learning rate is ten times full fine-tuning's, at every rank.

https://thinkingmachines.ai/blog/lora/, "Optimal learning rate and rank": α = 32, a scale of α/r,
constant learning rates. The best was within a factor of two from rank 4 to 512, lower for rank 1.
"""

from collections.abc import Sequence

import jax
import numpy as np

import lora_jax
from benchmarks.published import digits
from benchmarks.published.result import Line, Picture, Result, Row

RATES = tuple(1e-4 * 2.0**k for k in range(12))
RANKS = (1, 4, 16, 64)
SOURCE = "https://thinkingmachines.ai/blog/lora/"
SETTING = (
    "digits, MLP of width {width}, odd then even, α=32, Adam, {steps} steps, rates in factors of "
    "2, {seeds} seeds"
)


def config_of(rank: int, head: str) -> lora_jax.LoraConfig:
    """Return LoRA on every kernel; the last one has ten outputs, so its rank is at most eight."""
    return lora_jax.LoraConfig(
        rank=rank, alpha=32, overrides={head: lora_jax.Override(rank=min(rank, 8))}
    )


def sweep(
    widths: tuple[int, ...],
    ranks: Sequence[int],
    rates: Sequence[float],
    steps: int,
    seeds: int,
) -> dict[int, np.ndarray]:
    """Return the final loss on held-out digits at each rate, by rank (0 for full fine-tuning)."""
    train, test = digits.held_out(digits.even())
    head = f"layer_{len(widths)}"
    return {
        rank: np.array(
            [
                np.median(
                    [
                        digits.tune(
                            digits.pretrained(widths, seed),
                            train,
                            test,
                            jax.random.key(seed),
                            rate,
                            config=config_of(rank, head) if rank else None,
                            steps=steps,
                            every=steps,
                        )[-1]
                        for seed in range(seeds)
                    ]
                )
                for rate in rates
            ]
        )
        for rank in (0, *ranks)
    }


def best(losses: dict[int, np.ndarray], rates: Sequence[float]) -> dict[int, float]:
    """Return the rate of the lowest loss, by rank; a run that diverged does not count."""
    return {rank: rates[int(np.nanargmin(values))] for rank, values in losses.items()}


def over_rank(
    width: int, ranks: Sequence[int], rates: Sequence[float], steps: int, seeds: int
) -> Result:
    """Measure the best rate at several ranks, and of full fine-tuning."""
    losses = sweep((width, width), ranks, rates, steps, seeds)
    found = best(losses, rates)
    ratios = {rank: found[rank] / found[0] for rank in ranks}
    high = [found[rank] for rank in ranks if rank >= 4]
    setting = SETTING.format(width=width, steps=steps, seeds=seeds)
    rows = [
        Row(
            "best learning rate over the rank",
            SOURCE,
            setting,
            "within a factor of 2 from r=4 to 512, lower for r=1",
            f"within a factor of {max(high) / min(high):.3g} from r=4 to {max(ranks)}; "
            f"{found[1]:.1e} for r=1, {max(high):.1e} for r={max(ranks)}",
            max(high) / min(high) <= 2,
        ),
        Row(
            "best learning rate, LoRA over full",
            SOURCE,
            setting,
            "10",
            ", ".join(f"{ratio:.3g} (r={rank})" for rank, ratio in ratios.items()),
            all(5 <= ratios[rank] <= 20 for rank in ranks if rank >= 4),
            "these networks are narrow, and the ratio grows with the width: see the next row",
        ),
    ]
    lines = [
        Line(f"LoRA, r={rank}" if rank else "full", rates, values, "o-" if rank else "ks-")
        for rank, values in losses.items()
    ]
    title = "even digits after odd ones: loss by learning rate"
    picture = Picture(
        "learning_rates", title, "learning rate", "held-out loss at the end", lines, "xy"
    )
    return Result(rows, [picture])


def over_width(
    widths: Sequence[int], rank: int, rates: Sequence[float], steps: int, seeds: int
) -> Result:
    """Measure the ratio of best rates at several widths, and the power law in the width."""
    ratios = []
    for width in widths:
        found = best(sweep((width, width), (rank,), rates, steps, seeds), rates)
        ratios.append(found[rank] / found[0])
    power, log_scale = np.polyfit(np.log(widths), np.log(ratios), 1)
    reached = (10 / np.exp(log_scale)) ** (1 / power)
    agrees = bool(1000 <= reached <= 10000)
    row = Row(
        "best learning rate, LoRA over full, by width",
        SOURCE,
        SETTING.format(width=",".join(map(str, widths)), steps=steps, seeds=seeds) + f", r={rank}",
        "10 for all models, of widths from 2,048",
        ", ".join(f"{ratio:.3g} ({width})" for width, ratio in zip(widths, ratios, strict=True))
        + f"; it grows as width^{power:.2f}, and would be 10 at a width of {reached:,.0f}",
        agrees,
        "" if agrees else "here the width matters, there not; tasks and widths are not the same",
    )
    far = np.array([widths[0], 5120.0])
    lines = [
        Line("here", widths, ratios, "o-"),
        Line("published", [2048, 5120], [10, 10]),
        Line("fit", far, np.exp(log_scale) * far**power, "--"),
    ]
    picture = Picture(
        "learning_rates_width", "best learning rate, LoRA over full", "width", "ratio", lines, "xy"
    )
    return Result([row], [picture])


def run() -> Result:
    """Measure over the rank, then over the width."""
    ranks = over_rank(256, RANKS, RATES, steps=200, seeds=3)
    widths = over_width((64, 256, 1024), 16, RATES[2:10], steps=100, seeds=3)
    return Result([*ranks.rows, *widths.rows], [*ranks.pictures, *widths.pictures])
