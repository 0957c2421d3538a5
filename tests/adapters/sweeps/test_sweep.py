"""A sweep trains each of its runs as the run trains alone, in one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from tests.adapters.sweeps.by_hand import (
    BASE,
    CONFIG,
    LOSS,
    SCHEDULE,
    STEPS,
    batches,
    train_alone,
)
from tests.programs import normal

RUNS = [
    lora.Run(learning_rate=1e-2, rank=2),
    lora.Run(learning_rate=3e-2, rank=4, alpha=8, weight_decay=0.1, seed=3),
    lora.Run(learning_rate=1e-2, scaling="rslora", dora=True, clip=0.1, seed=2),
    lora.Run(learning_rate=1e-2, rank=4, init="orthogonal", dropout=0.3, b_ratio=4, seed=1),
    # it waits for a slot
    lora.Run(learning_rate=2e-2, rank=1, init="gaussian", dropout=0.1, weight_decay=0.2),
]


def assert_trains_as_alone(run, data, losses, overlay):
    want, overlay_alone = train_alone(run, data)
    np.testing.assert_allclose(losses, want, rtol=1e-6)
    assert jax.tree.structure(overlay) == jax.tree.structure(overlay_alone)
    for got, expected in zip(jax.tree.leaves(overlay), jax.tree.leaves(overlay_alone), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_every_run_trains_as_it_does_alone_and_so_does_one_that_comes_later():
    traces = []

    def loss(params, *batch):
        traces.append(0)
        return LOSS(params, *batch)

    data = batches()
    sweep = lora.sweep(loss, BASE, RUNS, CONFIG, *data[0], slots=4, schedule=SCHEDULE)
    state = sweep.init()
    before, first, second = len(traces), [], []
    for batch in data:
        state, losses = sweep.step(state, *batch)
        first.append(losses)
    trained = sweep.adapters(state)
    state = sweep.replace(state, 2, RUNS[4])
    for batch in data:
        state, losses = sweep.step(state, *batch)
        second.append(losses)
    assert len(traces) - before == 1
    for slot, run in enumerate(RUNS[:4]):
        assert_trains_as_alone(run, data, np.array(first)[:, slot], trained[slot])
    assert_trains_as_alone(RUNS[4], data, np.array(second)[:, 2], sweep.adapters(state)[2])
    assert state.step.tolist() == [2 * STEPS, 2 * STEPS, STEPS, 2 * STEPS]


@pytest.mark.slow
def test_every_run_may_see_its_own_batch_and_small_ranks_be_computed_apart_in_turn():
    each = [batches(seed, steps=3) for seed in range(3)]
    runs = lora.grid(learning_rate=1e-2, rank=[2, 4, 1])
    axes = (0, 1)
    options = {"batch_axes": axes, "buckets": [2], "at_once": 1}
    sweep = lora.sweep(LOSS, BASE, runs, CONFIG, *each[0][0], schedule=SCHEDULE, **options)
    state, found = sweep.init(), []
    for batches_ in zip(*each, strict=True):
        tokens, y = zip(*batches_, strict=True)
        batch = jnp.stack(tokens), jnp.stack(y, 1)
        state, losses = sweep.step(state, *batch)
        found.append(losses)
    for slot, run in enumerate(runs):
        want, _ = train_alone(run, each[slot])
        np.testing.assert_allclose(np.array(found)[:, slot], want, rtol=1e-6)
    shared = sweep.evaluate(state, *each[0][0])
    apart = sweep.evaluate(state, *batch, batch_axes=axes)
    for slot, overlay in enumerate(sweep.adapters(state)):
        params = lora.join(BASE, overlay)
        np.testing.assert_allclose(shared[slot], LOSS(params, *each[0][0]), rtol=1e-6)
        np.testing.assert_allclose(apart[slot], LOSS(params, *each[slot][-1]), rtol=1e-6)
    types = str(jax.make_jaxpr(sweep.update)(BASE, state, *batch))
    assert "f32[2,2,16]" in types and "f32[1,4,16]" in types  # B of both buckets
    with pytest.raises(lora.ConfigError, match=r"rank 4 does not fit slot 0.* the slots \[1\]"):
        sweep.replace(state, 0, runs[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"clip": -1}, "clip must not be negative"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"dropout": 1.0}, "dropout must be a probability"),
        ({"init": "pissa"}, 'changes the base, .* use "kaiming"'),
        ({"options": {"b1": "0.9"}}, "options must be numbers by name"),
    ],
)
def test_a_run_says_which_of_its_fields_has_no_meaning(fields, message):
    with pytest.raises(lora.ConfigError, match=message):
        lora.Run(**{"learning_rate": 1e-3} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": [4]}, "grid: pass learning_rate="),
        ({"learning_rate": []}, "grid: learning_rate has no values"),
        ({"learning_rate": 1e-3, "lerning": 1}, "no field lerning; did you mean learning_rate?"),
    ],
)
def test_a_grid_says_which_of_its_axes_has_no_meaning(fields, message):
    with pytest.raises(lora.ConfigError, match=message):
        lora.grid(**fields)


@pytest.mark.parametrize("at_once", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_what_vmap_has_no_rule_for_is_computed_one_slot_after_another(at_once):
    """JAX maps no `ragged_dot` of differing activations with weights that are the same."""
    base = {**BASE, "experts": normal(7, (3, 8, 8), jnp.float32)}
    targets = lora.LoraConfig(targets=["up", "experts"])
    sizes = jnp.array([5, 3, 4])

    def plain(params, tokens, y):
        x = jnp.tanh(params["embed"][tokens] @ params["up"]) @ params["down"]
        return ((jax.lax.ragged_dot(x, params["experts"], sizes) - y) ** 2).mean()

    adapted, data = lora.lora(plain), batches(steps=2)
    runs = [lora.Run(learning_rate=rate, rank=2) for rate in (1e-3, 1e-2, 3e-2)]
    sweep = lora.sweep(adapted, base, runs, targets, *data[0], at_once=at_once)
    state, found = sweep.init(), []
    for batch in data:
        state, losses = sweep.step(state, *batch)
        found.append(losses)
    found.append(sweep.evaluate(state, *data[0]))
    differentiate = jax.jit(jax.value_and_grad(adapted))
    for slot, run in enumerate(runs):
        params = lora.init(jax.random.key(0), base, run.config(targets), plain, *data[0])
        tx = lora.freeze(optax.adamw(run.learning_rate, weight_decay=0), params)
        own, want = tx.init(params), []
        for batch in data:
            loss, gradients = differentiate(params, *batch)
            updates, own = tx.update(gradients, own, params)
            params, want = lora.apply_updates(params, updates), [*want, loss]
        want.append(differentiate(params, *data[0])[0])
        np.testing.assert_allclose([x[slot] for x in found], want, rtol=1e-6)


def test_a_sweep_says_what_does_not_fit():
    batch = batches(steps=1)[0]
    runs = lora.grid(learning_rate=[1e-3, 1e-2])
    with pytest.raises(lora.ConfigError, match="init='pissa' changes the base"):
        lora.sweep(LOSS, BASE, runs, lora.LoraConfig(init="pissa"), *batch)
    with pytest.raises(lora.ConfigError, match="a sequence of one or more Run"):
        lora.sweep(LOSS, BASE, runs[0], CONFIG, *batch)
    sweep = lora.sweep(LOSS, BASE, runs, CONFIG, *batch, batch_axes=(None, 1))
    with pytest.raises(
        lora.ConfigError, match=r"argument 1 .* \(12, 8\), .* axis 1 has the 2 slots"
    ):
        sweep.step(sweep.init(), *batch)


def _halved(key, w, layout, rank, scale, dtype):
    """Initial values that change the base."""
    a, b = (jnp.zeros(shape(w.shape, rank), dtype) for shape in (layout.a_shape, layout.b_shape))
    return w / 2, a, b


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"slots": 2}, "slots=2 must be from 1 to the number of runs, 1"),
        ({}, {"buckets": [0]}, "buckets must be ranks, positive integers"),
        ({}, {"at_once": 0}, "at_once must be a positive integer or None"),
        ({"weight_decay": 0.1}, {"optimizer": optax.sgd}, "optimizer sgd takes no weight_decay"),
        ({"options": {"b9": 1}}, {}, "optimizer adamw takes no b9"),
        ({"init": _halved}, {}, "init=.* changes the base, which all runs share"),
    ],
)
def test_a_sweep_says_what_does_not_fit_together(fields, options, message):
    runs = [lora.Run(learning_rate=1e-2, **fields)]
    with pytest.raises(lora.LoraError, match=message):
        lora.sweep(LOSS, BASE, runs, CONFIG, *batches(steps=1)[0], **options)


def test_a_run_that_needs_more_than_the_sweep_has_is_refused():
    runs = [lora.Run(learning_rate=1e-2, options={"b1": 0.8})]
    sweep = lora.sweep(LOSS, BASE, runs, CONFIG, *batches(steps=1)[0])
    state = sweep.init()
    for fields, message in [
        ({"rank": 4}, "rank 4 does not fit a stack of rank 3"),
        ({"dora": True}, "has a magnitude"),
        ({"dropout": 0.1}, "dropout 0.1 does not fit"),
        ({"options": {}}, "they must be the same"),
    ]:
        with pytest.raises(lora.LoraError, match=message):
            sweep.replace(state, 0, dataclasses.replace(runs[0], **fields))
    with pytest.raises(lora.ConfigError, match="no slots"):
        sweep.replace(state, 1, runs[0])
