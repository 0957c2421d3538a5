"""Digits tuned by many runs at once, in one `lora_jax.sweep`; each run draws its own batches."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.published import digits


class Found(NamedTuple):
    """What runs reach on held-out digits, `[runs]` each."""

    loss: np.ndarray
    accuracy: np.ndarray  # from 0 to 1


def tune(
    base: Any,
    runs: Sequence[lora_jax.Run],
    config: lora_jax.LoraConfig,
    train: digits.Data,
    held_out: Sequence[digits.Data],
    steps: int,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
) -> list[Found]:
    """Train all runs in one sweep and return what they reach on each of `held_out`.

    Runs of the same seed start from the same values (but for rank and kind) and see the same
    batches. Where the initial values of `config` are made of the weights, so is the base.
    """
    adapted = lora_jax.init(jax.random.key(0), base, config, digits.mlp, train.images)
    base, start = lora_jax.split(adapted)
    images, labels = map(jnp.asarray, train)
    sweep = lora_jax.sweep(
        lora_jax.lora(digits.loss, on_dense="error"),
        base,
        runs,
        dataclasses.replace(config, init="kaiming") if changes_base(config) else config,
        images[: digits.BATCH],
        labels[: digits.BATCH],
        optimizer=optimizer,
        batch_axes=0,
    )
    state = sweep.init()
    if changes_base(config):
        adapters = lora_jax.stack([start] * len(runs))
        state = dataclasses.replace(state, adapters=adapters)

    @jax.jit
    def trained(base: Any, state: Any) -> Any:
        def step(state: Any, number: jax.Array) -> Any:
            draw = lambda seed: jax.random.randint(
                jax.random.fold_in(jax.random.key(seed), number), (digits.BATCH,), 0, len(labels)
            )
            chosen = jax.vmap(draw)(state.seed)
            return sweep.update(base, state, images[chosen], labels[chosen])[0], None

        return jax.lax.scan(step, state, jnp.arange(steps))[0]

    adapters = trained(base, state).adapters
    return [reached(base, adapters, data) for data in held_out]


def changes_base(config: lora_jax.LoraConfig) -> bool:
    """Return whether the initial values take something out of the weights."""
    return config.init in ("pissa", "olora")


def reached(base: Any, adapters: Any, data: digits.Data) -> Found:
    """Return the loss and the accuracy of each adapter of a stack."""

    @jax.jit
    def measured(base: Any, adapters: Any) -> tuple[jax.Array, jax.Array]:
        apply = lambda one: lora_jax.lora(digits.mlp)(lora_jax.join(base, one), data.images)
        logits = jax.vmap(apply)(adapters)
        labels = jnp.broadcast_to(data.labels, logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(1), (logits.argmax(2) == labels).mean(1)

    return Found(*map(np.asarray, measured(base, adapters)))


def best(values: np.ndarray, rates: Sequence[float]) -> float:
    """Return the rate of the least value `[rates]`; a run that diverged does not count."""
    return rates[int(np.nanargmin(values))]


def power(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent p of the power law y ∝ x^p that fits best."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def doubled(first: float, count: int) -> tuple[float, ...]:
    """Return `count` rates, each twice the one before.

    >>> doubled(0.5, 3)
    (0.5, 1.0, 2.0)
    """
    return tuple(itertools.accumulate([2.0] * (count - 1), float.__mul__, initial=first))
