"""The contenders of the benchmarks do the same work; otherwise comparing them means nothing."""

import functools
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest

import lora_jax
from benchmarks import contenders
from benchmarks.contenders import Setting
from benchmarks.decoder import VARIANTS, Size
from benchmarks.measure import Stepper, in_turn, median

TINY = Size(layers=2, width=16, heads=2, vocabulary=32, batch=2, time=8, rank=2)
ADAPTERS = (
    contenders.by_hand_flat,
    contenders.merge_in_loss,
    contenders.joined,
    contenders.split,
)


@pytest.fixture(autouse=True)
def promotion():
    """Allow rank promotion, as users write models: a norm's weight meets three axes."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def evaluate(make, setting):
    contender = make(setting)
    return jax.jit(contender.grads)(*contender.start())


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_contenders_agree_on_loss_and_gradients(variant, quick_compile):
    setting = Setting(TINY, variant)
    loss, grads = evaluate(contenders.by_hand, setting)
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-4
    for make in ADAPTERS:
        other_loss, other = evaluate(make, setting)
        np.testing.assert_allclose(other_loss, loss, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, grads)


def instructions(make, setting):
    """Count the instructions of a compiled step, without their names and without its outputs."""
    contender = make(setting)
    step = jax.jit(contender.make(), donate_argnums=0)
    text = step.lower(*contender.start()).compile().as_text()
    lines = [line for line in text.splitlines() if " = " in line and " ROOT %tuple" not in line]
    plain = [re.sub(r", metadata=\{[^}]*\}|index=\d+|\(\d+\)|%[\w.-]+", "", x) for x in lines]
    return Counter(line.strip() for line in plain)


@pytest.mark.slow
def test_joined_and_split_are_one_program(quick_compile):
    """Frozen leaves that the joined form hands through cost nothing: only the outputs differ."""
    setting = Setting(TINY, "scan")
    joined = instructions(contenders.joined, setting)
    split = instructions(contenders.split, setting)
    assert joined.total() > 300
    assert joined == split


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_one_model(variant, quick_compile):
    losses = [evaluate(contenders.by_hand, Setting(TINY, v))[0] for v in ("unrolled", variant)]
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_steps_train_and_the_floor_is_below_all(quick_compile):
    setting = Setting(TINY, "unrolled")
    wanted = (contenders.floor, contenders.by_hand, contenders.full, contenders.joined)
    steppers = [Stepper(make(setting)) for make in wanted]
    flops = {s.key: s.program().flops for s in steppers}
    assert flops["a"] < min(flops["b"], flops["h"]) and max(flops["b"], flops["h"]) < flops["e"]
    assert abs(steppers[1].first_loss - steppers[3].first_loss) < 1e-5
    times = in_turn([s.step for s in steppers], rounds=2, warm_up=0)
    assert [len(rounds) for rounds in times] == [2] * len(steppers)
    assert all(s.trace() > 0 for s in steppers)
    assert steppers[3].first_loss - steppers[3].loss() > 1e-3  # it trains
    assert median([3.0, 1.0, 2.0]) == 2.0


@pytest.mark.parametrize("form", ["joined", "split"])
def test_one_vector_of_all_adapters_is_the_same_update(form):
    """With `optax.flatten` the mask still applies and the values are equal, as the docs say."""
    params = contenders.joined(Setting(TINY, "scan")).start()[0][0]
    _, adapters = lora_jax.split(params)
    tree = params if form == "joined" else adapters
    grads = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), tree)

    @functools.partial(jax.jit, static_argnums=0)
    def updated(tx):
        tx = lora_jax.freeze(tx, tree)
        updates, state = tx.update(grads, tx.init(tree), tree)
        updates, state = tx.update(grads, state, tree)
        return updates, state

    (got, state), (want, _) = (
        updated(optax.flatten(optax.adamw(1e-3))),
        updated(optax.adamw(1e-3)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    moved = jax.tree.map(
        lambda label, u: (label == "train") == np.any(u), lora_jax.labels(tree), got
    )
    assert all(jax.tree.leaves(moved))
    trained = sum(x.size for p in contenders.pairs_of(params).values() for x in p)
    assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (trained,), (trained,)]
