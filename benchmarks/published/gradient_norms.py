"""rsLoRA (https://arxiv.org/abs/2312.03732): gradients do not shrink as the rank grows.

With B zero the gradient of B is scale · (x·A)ᵀ·g. The entries of A do not depend on the rank, so
its norm grows as scale · √r: flat for a scale of α/√r, falling as 1/√r for α/r.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.published.result import Line, Numbers, Picture, Result, Row

RANKS = (4, 16, 64, 256, 1024)
ALPHA = 16
SCALINGS = {"rslora": "α/√r", "standard": "α/r"}
BATCH = 32


def model(params: Any, x: jax.Array) -> jax.Array:
    """Apply three square layers with tanh between them, `[batch, width]` to the same shape."""
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def task(seed: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return a model, and one that differs by noise of a tenth of its weights' norm."""
    rng = np.random.default_rng(seed)
    base, noise = rng.standard_normal((2, 3, width, width), np.float32) / np.float32(width**0.5)
    return list(base), list(base + np.float32(0.1) * noise)


@partial(jax.jit, static_argnames=("config", "steps"))
def norms(
    base: Any, teacher: Any, key: jax.Array, config: lora_jax.LoraConfig, steps: int
) -> jax.Array:
    """Return the norm of the gradient of all A and B at each step of Adam towards the teacher."""
    init_key, data_key = jax.random.split(key)
    example = jax.ShapeDtypeStruct((BATCH, base[0].shape[0]), jnp.float32)
    frozen, adapters = lora_jax.split(lora_jax.init(init_key, base, config, model, example))
    tx = lora_jax.freeze(optax.adam(1e-4), adapters)
    adapted = lora_jax.lora(model, on_dense="error")

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        error = adapted(lora_jax.join(frozen, adapters), x) - model(teacher, x)
        return (error**2).sum(-1).mean() / 2

    def step(state: tuple, key: jax.Array) -> tuple:
        adapters, moments = state
        grads = jax.grad(loss)(adapters, jax.random.normal(key, example.shape))
        updates, moments = tx.update(grads, moments, adapters)
        trained = [leaf for node in grads for leaf in (node.a, node.b)]
        return (optax.apply_updates(adapters, updates), moments), optax.tree.norm(trained)

    return jax.lax.scan(step, (adapters, tx.init(adapters)), jax.random.split(data_key, steps))[1]


def slope(ranks: Numbers, values: Numbers) -> float:
    """Return the exponent p of values ∝ rᵖ, by least squares on logarithms."""
    return float(np.polyfit(np.log(ranks), np.log(values), 1)[0])


def measure(ranks: Sequence[int], width: int, steps: int, seeds: int) -> dict[str, np.ndarray]:
    """Return medians over seeds, by scaling: `[rank, step]`."""
    tasks = [task(seed, width) for seed in range(seeds)]
    found = {}
    for scaling in SCALINGS:
        configs = [lora_jax.LoraConfig(rank=rank, alpha=ALPHA, scaling=scaling) for rank in ranks]
        found[scaling] = np.array(
            [
                np.median(
                    [
                        norms(*each, jax.random.key(seed), config, steps)
                        for seed, each in enumerate(tasks)
                    ],
                    axis=0,
                )
                for config in configs
            ]
        )
    return found


def run(ranks: Sequence[int] = RANKS, width: int = 1024, steps: int = 10, seeds: int = 3) -> Result:
    """Measure the first gradient, and the mean over the first steps of training."""
    found = measure(ranks, width, steps, seeds)
    rows, lines = [], []
    for scaling, expected in (("rslora", 0.0), ("standard", -0.5)):
        means = found[scaling].mean(1)
        at_start, trained = slope(ranks, found[scaling][:, 0]), slope(ranks, means)
        rows.append(
            Row(
                f"gradient norm over the rank, {SCALINGS[scaling]}",
                "2312.03732",
                f"three layers of width {width}, α={ALPHA}, r={ranks[0]}…{ranks[-1]}, Adam, "
                f"{steps} steps, {seeds} seeds",
                "flat" if expected == 0 else "falls as 1/√r (r^-0.5)",
                f"r^{at_start:+.3f} at the start, r^{trained:+.3f} in the mean of {steps} steps",
                max(abs(at_start - expected), abs(trained - expected)) < 0.1,
            )
        )
        lines.append(Line(f"{SCALINGS[scaling]}, first step", ranks, found[scaling][:, 0], "o--"))
        lines.append(Line(f"{SCALINGS[scaling]}, mean of {steps} steps", ranks, means, "o-"))
    picture = Picture(
        "rslora", "gradient norm of A and B", "rank", "norm, median of seeds", lines, "xy"
    )
    return Result(rows, [picture])
