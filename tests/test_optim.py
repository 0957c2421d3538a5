"""Masks, labels and `freeze`: adapters train, and nothing else moves by a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig, StructureError
from tests.cases import is_node, normal

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": normal(1, (7, 9), jnp.float32), "bias": jnp.zeros(9)},
    "norm": {"scale": jnp.ones(9)},
    "down": {"kernel": normal(2, (9, 3), jnp.float32)},
}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return (h * params["norm"]["scale"][None]) @ params["down"]["kernel"]


X, Y = normal(3, (16, 7), jnp.float32), normal(4, (16, 3), jnp.float32)
CONFIG = LoraConfig(rank=2, train=["up/bias"])
JOINED = lora_jax.init(KEY, PARAMS, CONFIG, model, X)


def loss(params, x, y):
    return ((lora_jax.lora(model)(params, x) - y) ** 2).mean()


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_mask_and_labels():
    mask, labels = lora_jax.mask(JOINED), lora_jax.labels(JOINED)
    node = mask["up"]["kernel"]
    assert (node.w, node.a, node.b, node.scale) == (False, True, True, False)
    assert (mask["up"]["bias"].w, mask["up"]["bias"].value) == (False, True)
    assert mask["norm"]["scale"] is False
    assert jax.tree.map(lambda label: label == "train", labels) == mask
    assert jax.tree.structure(mask) == jax.tree.structure(JOINED)


def test_optax_takes_mask_and_labels():
    masked = optax.chain(
        optax.masked(optax.sgd(1.0), lora_jax.mask(JOINED)),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, lora_jax.mask(JOINED))),
    )
    ones = jax.tree.map(jnp.ones_like, JOINED)
    updates, _ = masked.update(ones, masked.init(JOINED), JOINED)
    assert (
        float(updates["up"]["kernel"].a[0, 0]) == -1 and float(updates["up"]["kernel"].w[0, 0]) == 0
    )


def test_no_optimizer_state_for_frozen_leaves():
    state = lora_jax.freeze(optax.adam(1e-3), JOINED).init(JOINED)
    trained = lora_jax.count_params(JOINED).trainable
    assert count(state) == 2 * trained + 1  # two moments and a step counter


def train(form, tx, steps=100):
    """Losses and the final tree of 100 steps in the joined or the split form."""
    base, adapters = lora_jax.split(JOINED)
    params = JOINED if form == "joined" else adapters
    tx = lora_jax.freeze(tx, params)

    @jax.jit
    def step(params, state, base):
        whole = lambda p: p if form == "joined" else lora_jax.join(base, p)
        value, grads = jax.value_and_grad(lambda p: loss(whole(p), X, Y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, base)
        losses.append(float(value))
    return losses, params if form == "joined" else lora_jax.join(base, params)


# Weight decay and clipping are where a mask that misses a leaf would show.
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-2, weight_decay=0.1))


@pytest.mark.parametrize("form", ["joined", "split"])
def test_the_base_is_bit_identical_after_100_steps(form):
    losses, params = train(form, TX)
    assert losses[-1] < 0.5 * losses[0]
    base, _ = lora_jax.split(params)
    jax.tree.map(np.testing.assert_array_equal, base, PARAMS)
    for path in (("up", "kernel"), ("down", "kernel")):
        node, start = params[path[0]][path[1]], JOINED[path[0]][path[1]]
        np.testing.assert_array_equal(node.scale, start.scale)
        assert float(jnp.abs(node.a - start.a).max()) > 1e-3
        assert float(jnp.abs(node.b).max()) > 1e-3
    assert float(jnp.abs(params["up"]["bias"].value).max()) > 1e-3


def test_both_forms_take_the_same_steps():
    joined, _ = train("joined", TX, steps=20)
    split, _ = train("split", TX, steps=20)
    np.testing.assert_allclose(joined, split, rtol=1e-6)


def test_a_naive_gradient_without_freeze_gives_frozen_leaves_zero():
    grads = jax.jit(jax.grad(loss))(JOINED, X, Y)
    frozen, _ = lora_jax.split(grads)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), frozen)
    moved = optax.apply_updates(JOINED, jax.tree.map(lambda g: -0.1 * g, grads))
    jax.tree.map(np.testing.assert_array_equal, lora_jax.split(moved)[0], PARAMS)


def test_the_clipped_norm_counts_trained_leaves_alone():
    """Gradients of all ones: the norm is the root of the number of trained parameters."""
    ones = jax.tree.map(jnp.ones_like, JOINED)
    tx = lora_jax.freeze(optax.clip_by_global_norm(1.0), JOINED)
    updates, _ = tx.update(ones, tx.init(JOINED), JOINED)
    want = 1 / np.sqrt(lora_jax.count_params(JOINED).trainable)
    np.testing.assert_allclose(updates["down"]["kernel"].a, want, rtol=1e-6)
    naive = optax.tree.norm(jax.grad(loss)(JOINED, X, Y))
    trained = [
        x
        for n in jax.tree.leaves(jax.grad(loss)(JOINED, X, Y), is_leaf=is_node)
        if is_node(n)
        for x in ((n.a, n.b) if isinstance(n, lora_jax.LoraWeight) else (n.value,))
    ]
    np.testing.assert_allclose(naive, optax.tree.norm(trained), rtol=1e-6)


def test_freeze_refuses_a_tree_without_adapters():
    with pytest.raises(StructureError, match="no adapters"):
        lora_jax.freeze(optax.sgd(1.0), PARAMS)
