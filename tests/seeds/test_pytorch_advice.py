"""The PyTorch implementation's README: its advanced features and its advice on common issues."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig
from lora_jax.layers import linear
from tests.cases import is_node
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


# --- Regularization -------------------------------------------------------------------------------


def test_gradient_scaling():
    """ "Gradient scaling": clipped by the norm of what trains; rates of their own for A and B."""
    params = adapted_wide()
    clip = lora_jax.freeze(optax.clip_by_global_norm(0.5), params)
    groups = jax.tree.map(
        lambda n: dataclasses.replace(n, a="a", b="b") if is_node(n) else n,
        lora_jax.labels(params),
        is_leaf=is_node,
    )
    rates = {"a": optax.sgd(0.1), "b": optax.sgd(1.6), "freeze": optax.set_to_zero()}
    grouped = optax.multi_transform(rates, groups)

    @jax.jit
    def run(params):
        grads = gradient(params)
        return grads, *(tx.update(grads, tx.init(params), params)[0] for tx in (clip, grouped))

    grads, clipped, steps = run(params)
    close(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(clipped))), 0.5)
    for path, step in steps.items():
        close(step.a, -0.1 * np.asarray(grads[path].a))
        close(step.b, -1.6 * np.asarray(grads[path].b))


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


# --- Training stability ---------------------------------------------------------------------------


def test_gradient_norms_can_be_watched():
    """ "Monitor gradient norms": those of each adapter."""
    norms = jax.jit(lambda p: {path: optax.tree.norm(g) for path, g in gradient(p).items()})
    found = norms(adapted_wide())
    assert set(found) == set(WIDE) and all(x > 0 for x in found.values())


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
