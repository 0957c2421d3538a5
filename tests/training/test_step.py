"""One step: accumulation is exact, the base is unchanged, a non-finite loss changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.training import batching
from lora_jax.training.errors import TrainingError
from lora_jax.training.loss import language_sums
from lora_jax.training.optimizer import Optimizer
from lora_jax.training.step import init_state, make_evaluation, make_step
from tests.training import tiny_model
from tests.training.test_loss import example

# Rows with very different numbers of trained tokens, so a mean of means would differ.
_ROWS = [
    batching.pack_examples([example(seed, length, prompt)], 8).arrays
    for seed, (length, prompt) in enumerate([(8, 1), (2, 1), (8, 7), (3, 1)])
]
UNEVEN = batching.Data({name: np.concatenate([row[name] for row in _ROWS]) for name in _ROWS[0]})


@functools.cache
def run(accumulate):
    """Take two steps in float64, and return what they measured."""
    base, adapters = tiny_model.adapters(dtype=jnp.float64)
    tx = lora.freeze(optax.sgd(0.1), adapters)
    step = make_step(language_sums(tiny_model.apply), tx, accumulate)
    state, measured = init_state(adapters, tx), []
    for _ in range(2):
        state, sums = step(state, base, UNEVEN.arrays)
        measured.append(sums)
    return jax.device_get((state, measured))


def test_accumulation_is_the_big_batch(x64):
    for a, b in zip(*map(jax.tree.leaves, (run(1), run(4))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_accumulation_is_not_a_mean_of_means(x64):
    """If the two were equal here, the test above could not fail."""
    params = lora.merge(lora.join(*tiny_model.adapters(dtype=jnp.float64)))
    sums = jax.jit(language_sums(tiny_model.apply))
    parts = [sums(params, UNEVEN.take(np.array([row]))) for row in range(4)]
    means = np.mean([s["loss"] / s["weight"] for s in parts])
    exact = sum(s["loss"] for s in parts) / sum(s["weight"] for s in parts)
    assert abs(means - exact) > 1e-2
    np.testing.assert_allclose(run(4)[1][0]["loss"], exact, rtol=1e-12)


def test_an_empty_row_changes_nothing(x64):
    base, adapters = tiny_model.adapters(dtype=jnp.float64)
    tx = lora.freeze(optax.sgd(0.1), adapters)
    step = make_step(language_sums(tiny_model.apply), tx)
    found = [
        step(init_state(adapters, tx), base, UNEVEN.take(np.array(rows)))
        for rows in ([0, 1, 2], [0, 1, 2, -1])
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_that_of_the_merged_model(x64):
    """The oracle needs no lora: dL/dA from the gradient of the dense weights."""
    base, adapters = tiny_model.adapters(dtype=jnp.float64)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)

    def mean(a):
        dense = lora.merge(lora.join(base, a))
        sums = language_sums(tiny_model.apply)(dense, UNEVEN.arrays)
        return sums["loss"] / sums["weight"]

    gradient = jax.jit(jax.grad(mean))(adapters)
    tx = lora.freeze(optax.sgd(1.0), adapters)
    state, measured = make_step(language_sums(tiny_model.apply), tx, 2)(
        init_state(adapters, tx), base, UNEVEN.arrays
    )
    norm = 0.0
    for name in ("query", "value", "head"):
        for field in ("a", "b"):
            g = getattr(gradient[name], field)
            moved = getattr(adapters[name], field) - getattr(state.adapters[name], field)
            np.testing.assert_allclose(moved, g, rtol=1e-9, atol=1e-12)
            norm += float((g**2).sum())
        assert state.adapters[name].scale == adapters[name].scale
    np.testing.assert_allclose(measured["gradient_norm"], np.sqrt(norm), rtol=1e-9)


def test_a_loss_that_is_not_finite_changes_nothing():
    base, adapters = tiny_model.adapters()
    tx = Optimizer(0.1).transformation(adapters, 5)
    step = make_step(language_sums(tiny_model.apply), tx)
    state, _ = step(init_state(adapters, tx), base, UNEVEN.arrays)
    before = jax.device_get(state)
    broken = {**base, "head": base["head"].at[0, 0].set(jnp.inf)}
    state, measured = step(state, broken, UNEVEN.arrays)
    assert not np.isfinite(measured["loss"])
    for a, b in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_is_donated_and_the_adapters_are_not():
    base, adapters = tiny_model.adapters()
    tx = Optimizer().transformation(adapters, 5)
    state = init_state(adapters, tx)
    make_step(language_sums(tiny_model.apply), tx)(state, base, UNEVEN.arrays)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.adapters))
    assert not any(x.is_deleted() for x in jax.tree.leaves((adapters, base)))


def test_dropout_differs_by_step_and_not_by_run():
    config = lora.LoraConfig(rank=2, targets=["query", "value", "head"], dropout=0.5)
    base, adapters = tiny_model.adapters(config)
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    tx = lora.freeze(optax.sgd(0.0), adapters)
    step = make_step(language_sums(tiny_model.apply), tx, 2, seed=1)
    runs = []
    for _ in range(2):
        state, losses = init_state(adapters, tx), []
        for _ in range(3):
            state, measured = step(state, base, UNEVEN.arrays)
            losses.append(float(measured["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3
    evaluate = make_evaluation(language_sums(tiny_model.apply))
    once, twice = (evaluate(adapters, base, UNEVEN.arrays)["loss"] for _ in range(2))
    assert once == twice


def test_clipping_and_the_rates_of_b():
    """Adam's first update does not depend on the norm of the gradient, but SGD's does."""
    _, adapters = tiny_model.adapters()
    gradients = jax.tree.map(jnp.ones_like, adapters)
    count = sum(x.size for n in adapters.values() if n is not None for x in (n.a, n.b))
    tx = optax.chain(Optimizer(clip=0.5).clipping(adapters), lora.freeze(optax.sgd(1.0), adapters))
    updates, _ = tx.update(gradients, tx.init(adapters), adapters)
    np.testing.assert_allclose(updates["query"].a, -0.5 / np.sqrt(count), rtol=1e-6)

    tx = Optimizer(0.1, clip=0.5, b_ratio=4, warmup=0).transformation(adapters, 5)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(adapters), adapters)
    for name in ("query", "value", "head"):
        np.testing.assert_allclose(updates[name].a, -0.1, rtol=1e-5)
        np.testing.assert_allclose(updates[name].b, -0.4, rtol=1e-5)
        assert updates[name].scale == 0


@pytest.mark.parametrize(
    "field, value",
    [("learning_rate", 0), ("b_ratio", -1), ("warmup", -1), ("clip", np.nan), ("schedule", "x")],
)
def test_optimizers_that_are_refused(field, value):
    with pytest.raises(TrainingError, match=field):
        Optimizer(**{field: value})


@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (1, 5), (2, 10), (7, 0.0), (100, 0.1)])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_are_positive_and_reach_the_top(steps, warmup, schedule):
    rates = Optimizer(0.5, schedule, warmup).rates(steps)
    found = np.array([float(rates(step)) for step in range(steps)])
    assert (found > 0).all() and found.max() == 0.5
