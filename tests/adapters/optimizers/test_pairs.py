"""What holds for every optimizer that knows A from B: layouts, padding, stacks, dtypes, frames."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import ConfigError, Layout, LoraConfig, LoraWeight, StructureError, TrainedLeaf
from tests.adapters.optimizers.cases import (
    OPTIMIZERS,
    SHAPES,
    each,
    moves,
    noise,
    padded,
    train,
    weight,
)
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")


def close(got, want, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), got, want
    )


# --- every layout is matrices ---------------------------------------------------------------------


def matrices(node):
    """The adapters of the single matrices of a weight, by hand: layout "io", no batch axes."""
    batch = [len(range(n)) for n in node.layout.select("b", node.shape)]
    for index in itertools.product(*map(range, batch)):
        a, b = node.a[index], node.b[index]
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
        yield LoraWeight(None, a, b, node.scale[index], layout=Layout("io"))


@each("riemannian_sgd")
def test_every_layout_equals_its_matrices(name):
    """Two updates with given gradients; B is zero at first in half of the weights."""
    params = {
        name: weight(name, shape, 2, seed=i, b_zero=i % 2 == 0)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    slopes = [noise(s, params) for s in (31, 32)]

    def run(params, *slopes):
        tx = OPTIMIZERS[name](0.1, params)
        state = tx.init(params)
        for gradients in slopes:
            updates, state = tx.update(gradients, state, params)
            params = lora_jax.apply_updates(params, updates)
        return params

    together = jax.jit(run)(params, *slopes)
    split = lambda tree: {name: list(matrices(node)) for name, node in tree.items()}
    alone = jax.jit(run)(*map(split, (params, *slopes)))
    close(split(together), alone)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))


# --- padding, stacks, sweeps ----------------------------------------------------------------------


@each("riemannian_adamw", "lora_rite", "lora_muon")
def test_padding_stays_zero_and_changes_nothing(name):
    """Rank 2 in a stack of rank 6, which is more than the weight has outputs, from B = 0."""
    single = {"k": weight("io", (6, 5), 2, b_zero=True)}
    wide = {"k": padded(single["k"], 6)}
    want, _ = train(OPTIMIZERS[name](0.05, single), single, 4)
    got, _ = train(OPTIMIZERS[name](0.05, wide), wide, 4)
    assert float(jnp.abs(want["k"].b).max()) > 0.01
    np.testing.assert_array_equal(got["k"].a[:, 2:], 0)
    np.testing.assert_array_equal(got["k"].b[2:], 0)
    close(padded(want["k"], 6), got["k"], 2e-5)


@each("lora_muon")
def test_padding_stays_zero_whatever_comes(name):
    """Where decompositions and gradients have rounding errors; noise stands for them."""
    params = {"k": padded(weight("io", (6, 5), 2), 3)}
    found = moves(OPTIMIZERS[name](0.1, params), noise(3, params), params)["k"]
    np.testing.assert_array_equal(found.a[:, 2], 0)
    np.testing.assert_array_equal(found.b[2], 0)
    assert float(jnp.abs(found.a[:, :2]).min()) > 0


SWEPT = {"lora_rite": lora_jax.lora_rite, "lora_muon": lora_jax.lora_muon}


def scaled(learning_rate, params, weight_decay):
    """Riemannian AdamW as a sweep takes it."""
    return lora_jax.riemannian(optax.adamw(learning_rate, weight_decay=weight_decay), params)


@pytest.mark.slow
@each("lora_rite")
def test_a_sweep_over_ranks_and_rates(name):
    """Adapters of two ranks with a rate each, in one compiled step, as each alone."""
    base, x = {"w": normal(1, (6, 5), jnp.float32)}, normal(2, (4, 6), jnp.float32)
    loss = lambda params, x: (lora_jax.lora(lambda p, x: jnp.cos(x @ p["w"]))(params, x)).sum()
    make = SWEPT.get(name, scaled)
    runs = lora_jax.grid(rank=[1, 3], learning_rate=[0.05])
    runs[1] = dataclasses.replace(runs[1], learning_rate=0.1, weight_decay=0.1, clip=0.5)
    sweep = lora_jax.sweep(loss, base, runs, LoraConfig(), x, optimizer=make)
    state = sweep.init()
    starts = sweep.adapters(state)
    for _ in range(3):
        state, _ = sweep.step(state, x)
    for run, start, end in zip(runs, starts, sweep.adapters(state), strict=True):
        tx = make(run.learning_rate, start, weight_decay=run.weight_decay)
        if run.clip:
            clip = lora_jax.freeze(optax.clip_by_global_norm(run.clip), start)
            tx = optax.chain(clip, tx)
        alone = lambda p, start=start: loss(lora_jax.join(base, p), x)
        want, _ = train(tx, start, 3, loss=alone)
        close((end["w"].a, end["w"].b), (want["w"].a, want["w"].b), 2e-5)


@each()
def test_a_leading_axis_of_adapters_needs_no_vmap(name):
    """Transformations take a stack as it is: one more leading axis of every leaf."""
    stack = jax.tree.map(
        lambda *x: jnp.stack(x), *({"k": weight("bio", (2, 4, 3), 2, seed=s)} for s in (1, 5))
    )
    slopes = noise(7, stack)

    def one(params, slopes):
        tx = OPTIMIZERS[name](0.1, params)
        return tx.update(slopes, tx.init(params), params)[0]

    close(one(stack, slopes), jax.vmap(one)(stack, slopes))


# --- dtypes, other leaves, frozen leaves ----------------------------------------------------------


def floats(state):
    return {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.slow
@each("lora_muon")
def test_state_has_float32_numbers_beside_bfloat16_factors(name):
    half = {
        "k": weight("io", (6, 5), 2, dtype=jnp.bfloat16),
        "bias": TrainedLeaf(None, jnp.ones(3, jnp.bfloat16), jnp.float32(1)),
    }
    tx, slopes = OPTIMIZERS[name](0.1, half), noise(3, half)
    updates, state = jax.jit(lambda *x: tx.update(x[0], tx.init(x[1]), x[1]))(slopes, half)
    assert floats(jax.eval_shape(tx.init, half)) | floats(state) <= {jnp.dtype("float32")}
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, half)
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    close(widen(updates), moves(tx, widen(slopes), widen(half)), 2**-7)


@each("lora_muon")
def test_all_else_that_trains_gets_adam(name):
    """Magnitudes, biases and rows, beside a frozen base to the bit."""
    base = {
        "w": normal(1, (6, 5), jnp.float32),
        "bias": jnp.zeros(5),
        "table": normal(2, (7, 6), jnp.float32),
    }
    model = lambda p, ids: p["table"][ids] @ p["w"] + p["bias"][None]
    config = LoraConfig(rank=2, targets=["w"], dora=True, train=["bias"], rows={"table": [1, 4]})
    params = lora_jax.init(jax.random.key(0), base, config, model, jnp.arange(3))
    slopes = noise(3, params)
    updates = moves(OPTIMIZERS[name](0.1, params), slopes, params)
    plain = {
        "riemannian_sgd": optax.sgd(0.1),
        "riemannian_adamw": optax.adamw(0.1, weight_decay=0.1),
    }
    own = plain.get(name, optax.adam(0.1))
    own = lora_jax.freeze(own, params, only=("magnitude", "value"))
    want = moves(own, slopes, params)
    close(updates["w"].magnitude, want["w"].magnitude)
    close((updates["bias"], updates["table"]), (want["bias"], want["table"]))
    for frozen in (updates["w"].w, updates["w"].scale, updates["bias"].w, updates["table"].w):
        np.testing.assert_array_equal(frozen, 0)
    assert float(jnp.abs(updates["w"].b).min()) > 0


@pytest.mark.slow
@each("riemannian_sgd")
def test_a_chain_of_transformations_with_optax(name):
    """Clipping before, accumulation and a check around: shapes and dtypes fit in conditions."""
    params = {"k": weight("io", (6, 5), 2, dtype=jnp.bfloat16)}
    clip = lora_jax.freeze(optax.clip_by_global_norm(1.0), params)
    tx = optax.MultiSteps(
        optax.apply_if_finite(optax.chain(clip, OPTIMIZERS[name](0.1, params)), 2),
        every_k_schedule=2,
    )
    after, _ = train(tx, params, 2)
    assert float(jnp.abs(after["k"].b - params["k"].b).max()) > 0


@each("riemannian_sgd", "lora_muon")
def test_within_freeze_and_groups(name):
    """The same updates, where the layouts are those of the parameters it was made with."""
    params = {"up": weight("ioo", (6, 2, 3), 2), "down": weight("io", (6, 5), 2)}
    slopes = noise(3, params)
    run = lambda tx: moves(tx, slopes, params)
    outer = lora_jax.freeze(OPTIMIZERS[name](0.1, params), params)
    if name == "lora_muon":
        with pytest.raises(StructureError, match="lora_muon: down/scale: not in sight"):
            run(outer)
        return
    want = run(OPTIMIZERS[name](0.1, params))
    close(run(outer), want)
    grouped = lora_jax.groups({"up": OPTIMIZERS[name](0.1, params)}, params, default=optax.sgd(1.0))
    close(run(grouped)["up"], want["up"])


# --- errors ---------------------------------------------------------------------------------------

ONE = {"k": weight("io", (6, 5), 2)}
OTHER = {"other": weight("io", (6, 5), 2)}
UPDATE = lambda tx, params=ONE: tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda make: make(0.1, {"k": jnp.ones(3)}), StructureError, "no adapters"),
        (
            lambda make: make(0.1, ONE).update(ONE, make(0.1, ONE).init(ONE)),
            StructureError,
            r"call update\(gradients, state, params\)",
        ),
        (lambda make: UPDATE(make(0.1, OTHER)), StructureError, "k/a, k/b: not among the adapters"),
        (
            lambda make: UPDATE(lora_jax.lora_fa(make(0.1, ONE), ONE)),
            StructureError,
            "k/b came without the other factor",
        ),
    ],
    ids=["no_adapters", "no_params", "other_params", "b_alone"],
)
@each("lora_rite")
def test_misuse(name, call, error, message):
    with pytest.raises(error, match=message):
        call(OPTIMIZERS[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora_jax.riemannian(optax.sgd(1.0), ONE, damping=0), "damping must be above 0"),
        (lambda: lora_jax.riemannian(optax.sgd(1.0), ONE, float("nan")), "damping .* got nan"),
        (lambda: lora_jax.lora_rite(0.1, ONE, b1=1.0), "lora_rite: b1 must be .* below 1"),
        (lambda: lora_jax.lora_rite(0.1, ONE, eps=0.0), "eps"),
        (lambda: lora_jax.lora_muon(0.1, ONE, momentum=-0.1), "momentum must be at least 0"),
        (lambda: lora_jax.lora_muon(0.5, ONE, weight_decay=2.0), "must be below 1, got 0.5 and 2"),
    ],
)
def test_invalid_options(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
