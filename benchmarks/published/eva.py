"""EVA (https://arxiv.org/abs/2410.07170): A spans the directions in which the inputs vary most.

Theorems 3.1 and 3.2 of the paper: no other A with orthonormal columns keeps more of the inputs'
variance, or has a larger expected initial gradient. The oracle is a full SVD of all inputs.
"""

from typing import Any

import jax
import numpy as np

import lora_jax
from benchmarks.published import digits
from benchmarks.published.result import Line, Picture, Result, Row

SOURCE = "2410.07170"


def centred(base: Any, data: digits.Data) -> dict[str, np.ndarray]:
    """Return the inputs of each layer minus their mean, `[examples, fan_in]` in float64."""
    found = digits.inputs(base, data.images)
    return {name: np.asarray(x, np.float64) - np.mean(x, 0) for name, x in found.items()}


def largest_angle(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest principal angle between two spans in degrees, from its sine."""
    a, b = (np.linalg.qr(m.astype(np.float64))[0] for m in (a, b))
    return float(np.degrees(np.arcsin(min(1.0, float(np.linalg.norm(b - a @ (a.T @ b), 2))))))


def explained(x: np.ndarray, a: np.ndarray) -> float:
    """Return the share of the variance of `x` that the span of `a` keeps."""
    q = np.linalg.qr(a.astype(np.float64))[0]
    return float(((x @ q) ** 2).sum() / (x**2).sum())


def run(width: int = 256, rank: int = 8, batch: int = 64, seeds: int = 3) -> Result:
    """Measure angles to the full SVD, and what A explains next to the default and the optimum."""
    data = digits.even()
    parts = range(0, len(data.labels), batch)
    batches = [(data.images[i : i + batch],) for i in parts]
    config = lora_jax.LoraConfig(rank=rank)
    angles, shares = [], []
    for seed in range(seeds):
        base = digits.pretrained((width, width), seed)
        plain = lora_jax.init(jax.random.key(seed), base, config, digits.mlp, data.images)
        started = lora_jax.eva(digits.mlp, plain, batches, rho=1)
        for name, x in centred(base, data).items():
            top = np.linalg.svd(x, full_matrices=False)[2][:rank].T
            a, default = (np.asarray(tree[name]["kernel"].a) for tree in (started, plain))
            angles.append(largest_angle(top, a))
            shares.append([explained(x, m) for m in (default, a, top)])
    default, ours, best = np.reshape(shares, (seeds, -1, 3)).mean(1).T
    row = Row(
        "EVA's A against a full SVD of the inputs",
        SOURCE,
        f"digits, MLP of width {width}, even digits in batches of {batch}, r={rank}, three layers, "
        f"{seeds} seeds",
        "the top right singular vectors",
        f"largest principal angle {max(angles):.1e}°; it keeps {np.median(ours):.1%} of the "
        f"variance, the optimum {np.median(best):.1%}, the default start {np.median(default):.1%}",
        max(angles) < 0.1,
    )
    numbers = range(1, 1 + len(shares))
    labels = {"default start": "o", "EVA": "o", "full SVD": "kx"}
    lines = [
        Line(label, numbers, column, style)
        for (label, style), column in zip(labels.items(), np.transpose(shares), strict=True)
    ]
    title = f"variance of a layer's inputs that A keeps, r={rank}"
    return Result([row], [Picture("eva", title, "layer (of each seed)", "share", lines)])
