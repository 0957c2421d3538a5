"""Eckart–Young (1936): a trained adapter of rank r leaves just the tail of the singular values.

The task is linear, y = x·(W + Δ), on inputs whose second moments are the identity, so that the loss
is ‖ΔW - Δ‖². No ΔW of rank r gets below the sum of σᵢ² for i > r; training must find it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.published.result import Line, Picture, Result, Row

RANKS = (1, 2, 4, 8, 16, 32)
SOURCE = "10.1007/BF02288367"


def task(seed: int, width: int, singular_values: np.ndarray) -> tuple[jax.Array, ...]:
    """Return (W, Δ, inputs): Δ has these singular values; inputs `[2·width, width]`, XᵀX = I."""
    rng = np.random.default_rng(seed)
    orthogonal = lambda rows: np.linalg.qr(rng.standard_normal((rows, width)))[0]
    delta = orthogonal(width) * singular_values @ orthogonal(width).T
    w = rng.standard_normal((width, width)) / width**0.5
    return tuple(jnp.asarray(x, jnp.float32) for x in (w, delta, orthogonal(2 * width)))


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Apply the linear model, `[batch, width]` to the same shape."""
    return x @ params["kernel"]


@partial(jax.jit, static_argnames=("rank", "steps"))
def remaining(
    w: jax.Array, delta: jax.Array, x: jax.Array, key: jax.Array, rank: int, steps: int
) -> jax.Array:
    """Return ‖ΔW - Δ‖² after training with Adam and a cosine learning rate that decays to zero."""
    params = lora_jax.init(key, {"kernel": w}, lora_jax.LoraConfig(rank=rank), apply, x)
    base, adapters = lora_jax.split(params)
    tx = lora_jax.freeze(optax.adam(optax.cosine_decay_schedule(0.02, steps)), adapters)
    target = x @ (w + delta)

    def loss(adapters: Any) -> jax.Array:
        return ((lora_jax.lora(apply)(lora_jax.join(base, adapters), x) - target) ** 2).sum()

    def step(state: tuple, _: None) -> tuple:
        adapters, moments = state
        updates, moments = tx.update(jax.grad(loss)(adapters), moments, adapters)
        return (optax.apply_updates(adapters, updates), moments), None

    (adapters, _), _ = jax.lax.scan(step, (adapters, tx.init(adapters)), length=steps)
    return loss(adapters)


def errors(
    values: np.ndarray, ranks: Sequence[int], width: int, steps: int, seeds: int
) -> np.ndarray:
    """Return what training leaves, the median over seeds: `[rank]`."""
    return np.array(
        [
            np.median(
                [
                    remaining(*task(seed, width, values), jax.random.key(seed), rank, steps)
                    for seed in range(seeds)
                ]
            )
            for rank in ranks
        ]
    )


def run(ranks: Sequence[int] = RANKS, width: int = 64, steps: int = 3000, seeds: int = 3) -> Result:
    """Measure a full spectrum that falls by a tenth each, and one that ends at rank 4."""
    full = 0.9 ** np.arange(width)
    tails = np.array([(full[rank:] ** 2).sum() for rank in ranks])
    ours = errors(full, ranks, width, steps, seeds)
    worst = float(abs(ours / tails - 1).max())
    true_rank = 4
    enough = [rank for rank in ranks if rank >= true_rank]
    left = errors(full * (np.arange(width) < true_rank), enough, width, steps, seeds).max()
    setting = f"linear task of width {width}, white inputs, Adam, {steps} steps, {seeds} seeds; "
    rows = [
        Row(
            "least error of rank r",
            SOURCE,
            setting + f"σᵢ = 0.9ⁱ⁻¹, r={','.join(map(str, ranks))}",
            "Σ σᵢ² for i > r: " + ", ".join(f"{tail:.4g}" for tail in tails),
            ", ".join(f"{error:.4g}" for error in ours) + f" (at most {worst:.1e} above)",
            worst < 1e-2,
        ),
        Row(
            "error where the rank suffices",
            SOURCE,
            setting + f"true rank {true_rank}, r={','.join(map(str, enough))}",
            "0",
            f"at most {left:.1e}",
            bool(left < 1e-6),
        ),
    ]
    lines = [Line("singular tail", ranks, tails, "--"), Line("trained adapter", ranks, ours, "o")]
    title = "what an adapter of rank r leaves of a linear task"
    picture = Picture("eckart_young", title, "rank", "‖ΔW - Δ‖²", lines, "xy")
    return Result(rows, [picture])
