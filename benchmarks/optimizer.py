"""An optimizer update of many small leaves: `python -m benchmarks.optimizer --help`.

The adapters of 48 layers with four adapted weights each are updated with AdamW: leaf by leaf, as
one vector with `optax.flatten`, and as leaves stacked over all layers, as in a model that scans.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import lora_jax
from benchmarks.measure import in_turn, median
from benchmarks.report import ratio, versions

LAYERS, WEIGHTS, WIDTH, RANK = 48, 4, 256, 8


def overlay(stacked: bool) -> Any:
    """Return adapters in the split form: 384 trained leaves, or eight with the same values."""
    shape = (WIDTH, WIDTH)
    params = {
        f"layer_{i}": {f"w{j}": jax.ShapeDtypeStruct(shape, jnp.float32) for j in range(WEIGHTS)}
        for i in range(LAYERS)
    }
    if stacked:
        shape = (LAYERS, *shape)
        params = {f"w{j}": jax.ShapeDtypeStruct(shape, jnp.float32) for j in range(WEIGHTS)}
    overrides = {name: {"layout": "bio"} for name in params} if stacked else {}
    config = lora_jax.LoraConfig(rank=RANK, overrides=overrides)
    _, adapters = lora_jax.split(lora_jax.init(jax.random.key(0), params, config))
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), adapters)


class Update:
    """One way to update: a transformation, jitted or not."""

    def __init__(
        self, label: str, tx: optax.GradientTransformation, jitted: bool, stacked: bool = False
    ):
        self.label = label
        self._params = overlay(stacked)
        self._grads = jax.tree.map(jnp.ones_like, self._params)
        frozen = lora_jax.freeze(tx, self._params)
        self._state = frozen.init(self._params)
        self._step: Callable = self._of(frozen)
        self.trace = self.compile = 0.0
        if jitted:
            self._step = jax.jit(self._step, donate_argnums=(0, 1))
            start = time.perf_counter()
            lowered = self._step.lower(self._params, self._state, self._grads)
            self.trace = time.perf_counter() - start
            lowered.compile()
            self.compile = time.perf_counter() - start - self.trace

    @staticmethod
    def _of(tx: optax.GradientTransformation) -> Callable:
        def step(params: Any, state: Any, grads: Any) -> tuple:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def step(self) -> float:
        """Measure the seconds of one update."""
        start = time.perf_counter()
        self._params, self._state = self._step(self._params, self._state, self._grads)
        jax.block_until_ready((self._params, self._state))
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    rounds = parser.parse_args().rounds
    adamw, flat = optax.adamw(1e-3), optax.flatten(optax.adamw(1e-3))
    ways = [
        Update("leaf by leaf", adamw, False),
        Update("optax.flatten", flat, False),
        Update("leaf by leaf, jitted", adamw, True),
        Update("optax.flatten, jitted", flat, True),
        Update("layers stacked", adamw, False, stacked=True),
        Update("layers stacked, jitted", adamw, True, stacked=True),
    ]
    times = in_turn([way.step for way in ways], rounds)
    leaves = 2 * LAYERS * WEIGHTS
    table = Table(
        title=f"adamw on {leaves} leaves of {WIDTH * RANK} numbers, median of {rounds} rounds",
        caption=versions("optax"),
    )
    table.add_column("update")
    for heading in ("ms", "to leaf by leaf", "to that jitted", "trace ms", "compile ms"):
        table.add_column(heading, justify="right")
    for way, seconds in zip(ways, times, strict=True):
        table.add_row(
            way.label,
            f"{1e3 * median(seconds):.2f}",
            ratio(seconds, times[0]),
            ratio(seconds, times[2]),
            f"{1e3 * way.trace:.0f}" if way.trace else "",
            f"{1e3 * way.compile:.0f}" if way.compile else "",
        )
    Console(width=max(Console().width, 100)).print(table)


if __name__ == "__main__":
    main()
