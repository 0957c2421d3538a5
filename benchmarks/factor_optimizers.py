"""Compare optimizers of A and B over ranks and learning rates, on digits.

    python -m benchmarks.factor_optimizers

An MLP that was pre-trained on odd digits is tuned on even ones with LoRA of alpha 16 in all layers.
Each optimizer trains all ranks and rates in one sweep, on the same batches; rates fall linearly to
zero. Print the loss on
held-out digits at the end, the median of some seeds, with the best rate of each rank in brackets.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.published import digits

WIDTHS, ALPHA = (128, 128), 16
RANKS = (1, 2, 4, 8)
ADAMS = tuple(10.0**k for k in (-3.5, -3, -2.5, -2, -1.5, -1))  # learning rates for Adam's kin


def plus(learning_rate: Any, params: Any) -> Any:
    """Return LoRA+ with AdamW."""
    return lora_jax.lora_plus(learning_rate, params)


def riemannian(learning_rate: Any, params: Any) -> Any:
    """Return scaled AdamW with PEFT's damping."""
    return lora_jax.riemannian(optax.adamw(learning_rate), params)


#: By name: what makes the transformation, and learning rates.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "AdamW": (optax.adamw, ADAMS),
    "LoRA+ (ratio 16)": (plus, tuple(rate / 4 for rate in ADAMS)),
    "scaled AdamW": (riemannian, ADAMS),
    "LoRA-RITE": (lora_jax.lora_rite, ADAMS),
    "LoRA-Muon": (lora_jax.lora_muon, tuple(10 * rate for rate in ADAMS)),
}


def losses(name: str, ranks: tuple[int, ...], steps: int, seed: int) -> np.ndarray:
    """Return the losses on held-out digits `[ranks, rates]` after some steps."""
    make, rates = OPTIMIZERS[name]
    train, test = (digits.Data(*map(jnp.asarray, x)) for x in digits.held_out(digits.even()))
    base = digits.pretrained(WIDTHS, seed)
    runs = lora_jax.grid(rank=ranks, learning_rate=rates, seed=[seed])
    loss, config = lora_jax.lora(digits.loss), lora_jax.LoraConfig(alpha=ALPHA)
    example = digits.select(train, slice(2))
    falling = optax.linear_schedule(1.0, 0.0, steps)
    sweep = lora_jax.sweep(loss, base, runs, config, *example, optimizer=make, schedule=falling)

    @functools.partial(jax.jit, donate_argnums=1)
    def tune(base: Any, state: Any, keys: jax.Array) -> Any:
        def step(state: Any, key: jax.Array) -> tuple[Any, None]:
            chosen = jax.random.randint(key, (digits.BATCH,), 0, len(train.labels))
            return sweep.update(base, state, *digits.select(train, chosen))[0], None

        return jax.lax.scan(step, state, keys)[0]

    state = tune(base, sweep.init(), jax.random.split(jax.random.key(seed), steps))
    return np.asarray(sweep.evaluate(state, *test)).reshape(len(ranks), len(rates))


def main() -> None:
    """Print a table for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=OPTIMIZERS, help="this optimizer alone")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else OPTIMIZERS:
        rates = OPTIMIZERS[name][1]
        start = time.perf_counter()
        found = [losses(name, RANKS, arguments.steps, seed) for seed in range(arguments.seeds)]
        table = np.median(found, axis=0)
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)")
        print("rank  " + "".join(f"{rate:>10.1e}" for rate in rates))
        for rank, row in zip(RANKS, table, strict=True):
            shown = (f"[{x:.3f}]" if x == np.nanmin(row) else f"{x:.3f} " for x in row)
            print(f"{rank:<6d}" + "".join(f"{x:>10}" for x in shown))


if __name__ == "__main__":
    main()
