"""The PyTorch implementation's README: its advanced features and its advice on common issues."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig
from lora_jax.layers import linear
from tests.programs import is_node
from tests.seeds.helpers import (
    KEY,
    WIDE,
    X,
    adapted_wide,
    close,
    factors,
    make,
    normal,
    wide,
    with_b,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def gradient(params):
    return jax.grad(lambda p: lora_jax.lora(wide)(p, X).sum())(params)


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


# --- Weight management ----------------------------------------------------------------------------


def test_memory_efficient_training():
    """ "Memory-efficient training": a step holds less than half of what full fine-tuning does."""
    base, adapters = lora_jax.split(adapted_wide())
    run = lora_jax.lora(wide)

    def memory(trained, frozen, tx, apply):
        def step(trained, state, frozen, x):
            grads = jax.grad(lambda p: apply(p, frozen, x).sum())(trained)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state

        args = trained, jax.eval_shape(tx.init, trained), frozen, X
        found = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    adam = optax.adam(1e-3)
    joined = lambda p, w, x: run(lora_jax.join(w, p), x)
    lora = memory(adapters, base, lora_jax.freeze(adam, adapters), joined)
    assert lora < 0.5 * memory(WIDE, {}, adam, lambda p, _, x: wide(p, x))


def test_quantized_base():
    """ "Support for quantization": a base in eight bits, scaled where it is used."""
    w = normal(0, 16, 12)
    step = np.float32(abs(np.asarray(w)).max() / 448)
    fn = lambda p, x: x @ (p["kernel"].astype(jnp.float32) * step)
    x, params = normal(1, 5, 16), {"kernel": (w / step).astype(jnp.float8_e4m3fn)}
    params = with_b(lora_jax.init(KEY, params, LoraConfig(rank=2), fn, x))
    assert (params["kernel"].w.itemsize, params["kernel"].a.dtype) == (1, jnp.float32)
    w, a, b, _ = factors(params["kernel"])
    x = np.asarray(x)
    want = (x @ w.astype(np.float32) + x @ a @ b) * step
    close(jax.jit(lora_jax.lora(fn, on_dense="error"))(params, jnp.asarray(x)), want)


def test_quantized_base_with_a_correcting_adapter():
    """ "Support for quantization": LoftQ rounds the base to 4 bits; A·B takes up what that lost."""
    w = np.asarray(normal(0, 64, 24))
    params = {"w": jnp.asarray(w)}
    params = jax.jit(lambda p: lora_jax.init(KEY, p, LoraConfig(rank=8, init="loftq")))(params)
    rounded = np.asarray(params["w"].w)
    assert all(len(np.unique(column)) <= 16 for column in rounded.T)
    lost = np.linalg.norm(rounded - w)
    assert np.linalg.norm(lora_jax.merge(params)["w"] - w) < 0.9 * lost


# --- Regularization -------------------------------------------------------------------------------


def test_gradient_scaling():
    """ "Gradient scaling": clipped by the norm of what trains; rates of their own for A and B."""
    params = adapted_wide()
    clip = lora_jax.freeze(optax.clip_by_global_norm(0.5), params)
    plus = lora_jax.lora_plus(0.1, params, ratio=16, optimizer=optax.sgd)
    rates = {r".*\.b": optax.sgd(1.0), "layer_1": optax.sgd(2.0)}
    groups = lora_jax.groups(rates, params, default=optax.sgd(3.0))

    @jax.jit
    def run(params):
        grads = gradient(params)
        txs = clip, plus, groups
        return grads, *(tx.update(grads, tx.init(params), params)[0] for tx in txs)

    grads, clipped, faster, grouped = run(params)
    close(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(clipped))), 0.5)
    for path, node in grads.items():
        a, b = np.asarray(node.a), np.asarray(node.b)
        close(faster[path].a, -0.1 * a)
        close(faster[path].b, -1.6 * b)
        own = path == "layer_1"
        close(grouped[path].a, -(2.0 if own else 3.0) * a)
        close(grouped[path].b, -(2.0 if own else 1.0) * b)
        assert not np.asarray(faster[path].w).any()


def test_weight_normalization():
    """ "Weight normalization": DoRA's, every output a magnitude times a direction."""
    config = LoraConfig(rank=2, dora=True)
    params = jax.jit(lambda p: lora_jax.init(KEY, p, config, wide, X))(WIDE)
    run = jax.jit(lora_jax.lora(wide, on_dense="error"))
    close(run(params, X), jax.jit(wide)(WIDE, X))
    params = with_b(params)
    merged = {path: np.asarray(w) for path, w in lora_jax.merge(params).items()}
    for path, node in params.items():
        w, a, b, scale = factors(node)
        direction = w + scale * (a @ b)
        direction /= np.linalg.norm(direction, axis=0, keepdims=True)
        close(merged[path], np.asarray(node.magnitude)[None] * direction)
    close(run(params, X), run(merged, X), 1e-4)


# --- Architecture support -------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(4)(nn.gelu(nn.Conv(6, (3,))(x)))


def test_transformers_and_other_layers():
    """ "Compatible with transformer architectures", "extensible to other layer types"."""
    model, x = Block(), normal(0, 2, 5, 8)
    start = lambda key: lora_jax.init(key, model.init(key, x), LoraConfig(rank=2), model.apply, x)
    params = with_b(jax.jit(start)(KEY))
    found = [n.layout.axes for n in jax.tree.leaves(params, is_leaf=is_node) if is_node(n)]
    assert sorted(found) == ["iio", "iio", "io", "ioo", "ioo", "ioo"]

    def both(params):
        adapted = lora_jax.lora(model.apply, on_dense="error")(params, x)
        return adapted, model.apply(lora_jax.merge(params), x)

    close(*jax.jit(both)(params), 1e-4)


# --- Memory management ----------------------------------------------------------------------------


def test_merged_weights_serve_inference():
    """ "Use weight merging for inference": no latency and no memory beyond the base's own."""
    params = adapted_wide()
    cost = lambda c: (c.cost_analysis()["flops"], c.memory_analysis().argument_size_in_bytes)
    base, merged, adapted = (
        cost(compiled(fn, p, X))
        for fn, p in ((wide, WIDE), (wide, lora_jax.merge(params)), (lora_jax.lora(wide), params))
    )
    assert merged == base < adapted


def test_gradient_checkpointing():
    """ "Implement gradient checkpointing if needed": the same gradients from less memory."""
    base, adapters = lora_jax.split(adapted_wide())
    x = normal(5, 512, 128)

    def run(policy):
        def deep(params, x):
            block = jax.checkpoint(
                lambda x, w: jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w), policy=policy
            )
            for w in params.values():
                x = block(x, w)
            return x.mean()

        return compiled(
            jax.grad(lambda a: lora_jax.lora(deep, on_dense="error")(lora_jax.join(base, a), x)),
            adapters,
        )

    kept, redone = run(jax.checkpoint_policies.everything_saveable), run(None)
    for g, w in zip(*(jax.tree.leaves(c(adapters)) for c in (redone, kept)), strict=True):
        close(g, w)
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (redone, kept)]
    assert temporary[0] < 0.9 * temporary[1]


def test_memory_can_be_watched():
    """ "Monitor memory usage during training": here before it, for what a step will hold."""
    shapes = jax.eval_shape(adapted_wide)
    loss = lambda p, x: (lora_jax.lora(wide)(p, x) ** 2).mean()
    report = lora_jax.memory_report(loss, shapes, X)
    base, adapters = lora_jax.split(adapted_wide())
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert (report.adapted.base, report.adapted.adapters) == (size(base), size(adapters))
    assert report.full.optimizer == 2 * size(base) + 4  # Adam's moments and its step counter
    trained = lora_jax.count_params(adapted_wide()).trainable
    assert report.adapted.optimizer == 2 * 4 * trained + 4
    assert 0 < report.adapted.total < report.full.total / 2


# --- Training stability ---------------------------------------------------------------------------


def test_gradient_norms_can_be_watched():
    """ "Monitor gradient norms": those of each adapter, and how far it has moved its weight."""
    found = jax.jit(lambda p: lora_jax.norms(p, gradient(p)))(adapted_wide())
    grads = jax.jit(gradient)(adapted_wide())
    assert set(found) == set(WIDE)
    for path, node in adapted_wide().items():
        w, a, b, scale = factors(node)
        update = np.linalg.norm(scale * (a @ b))
        close(found[path]["grad_a"], np.linalg.norm(grads[path].a))
        close(found[path]["grad_b"], np.linalg.norm(grads[path].b))
        close(found[path]["relative"], update / np.linalg.norm(w))


def test_ranks_and_alphas_can_be_tuned():
    """ "Start with smaller rank values", "adjust alpha based on task": also afterwards."""
    config = LoraConfig(rank=1, overrides={"layer_2": {"rank": 4, "alpha": 8}})
    params = jax.eval_shape(lambda p: lora_jax.init(KEY, p, config), WIDE)
    assert [params[path].rank for path in WIDE] == [1, 1, 4]
    traces = []

    @jax.jit
    def run(params):
        traces.append(1)
        return lora_jax.lora(wide)(params, X)

    off, half, on = (run(lora_jax.set_scale(adapted_wide(), s)) for s in (0.0, 0.5, 1.0))
    close(off, jax.jit(wide)(WIDE, X))
    assert len(traces) == 1 and not np.allclose(half, on)


# --- Performance ----------------------------------------------------------------------------------


def test_batch_processing():
    """ "Implement batch processing": a batch is its examples."""
    params, x = with_b(make(linear, 10, 8, rank=2, alpha=4)), normal(0, 3, 4, 10)
    one_by_one = jax.vmap(jax.vmap(lambda x: linear.apply(params, x)))
    close(*jax.jit(lambda x: (linear.apply(params, x), one_by_one(x)))(x))
