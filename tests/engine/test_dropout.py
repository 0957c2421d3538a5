"""Where branch dropout drops: every use of a weight, and every example, on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax import LoraConfig
from tests.programs import normal

KEY = jax.random.key(3)
W = normal(1, (40, 6), "float32")
X = normal(0, (3, 40), "float32")


def dropped(fn, params, *args):
    """Return, for W of zeros, A of ones and B an identity, what is kept: row sums over inputs."""
    adapted = lora_jax.init(jax.random.key(0), params, LoraConfig(1, dropout=0.5), fn, *args)

    def fill(node):
        ones = jnp.ones_like
        return dataclasses.replace(
            node, w=jnp.zeros_like(node.w), a=ones(node.a), b=ones(node.b), scale=ones(node.scale)
        )

    is_node = lambda x: isinstance(x, lora_jax.LoraWeight)
    adapted = jax.tree.map(fill, adapted, is_leaf=is_node)
    return lora_jax.with_dropout(adapted, KEY), lora_jax.lora(fn, on_dense="error")


def inner(w, x):
    return x @ w


TWICE = {
    "written twice": inner,
    "jitted": jax.jit(inner),
    "a checkpoint": jax.checkpoint(inner),
    "a jitted checkpoint": jax.jit(jax.checkpoint(inner)),
}


@pytest.mark.parametrize("module", TWICE.values(), ids=TWICE)
def test_a_module_called_twice_drops_different_inputs(module, quick_compile):
    fn = lambda params, x: (module(params["w"], x), module(params["w"], x))
    params, run = dropped(fn, {"w": W}, X)
    first, second = jax.jit(run)(params, X)
    assert not np.allclose(first, second)
    again = run(params, X)
    np.testing.assert_allclose(again[0], first, rtol=1e-5)  # the same key, the same inputs
    # forward and backward drop alike: the output is linear in A, so <A, dA> is the output
    out, grads = jax.value_and_grad(lambda p: sum(y.sum() for y in run(p, X)), allow_int=True)(
        params
    )
    np.testing.assert_allclose((grads["w"].a * params["w"].a).sum(), out, rtol=1e-4)


def single(params, x):
    return inner(params["w"], x)


MAPPED = {
    "around": lambda run: jax.vmap(run, (None, 0)),
    "around, jitted": lambda run: jax.vmap(jax.jit(run), (None, 0)),
    "twice around": lambda run: (
        lambda p, x: jax.vmap(jax.vmap(run, (None, 0)), (None, 0))(p, x[None])[0]
    ),
}


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_each_example_under_vmap_drops_its_own_inputs(mapped, quick_compile):
    params, run = dropped(single, {"w": W}, X)
    same = jnp.broadcast_to(X[:1], X.shape)
    outs = mapped(run)(params, same)
    assert len({float(row[0]) for row in outs}) == len(outs)
    grads = jax.vmap(jax.grad(lambda p, x: run(p, x).sum(), allow_int=True), (None, 0))(
        params, same
    )
    assert not np.allclose(grads["w"].a[0], grads["w"].a[1])


def test_vmap_inside_the_function_too(quick_compile):
    fn = lambda params, x: jax.vmap(lambda row: inner(params["w"], row))(x)
    params, run = dropped(fn, {"w": W}, X)
    outs = run(params, jnp.broadcast_to(X[:1], X.shape))
    assert len({float(row[0]) for row in outs}) == len(outs)


def test_a_key_per_example_is_kept(quick_compile):
    params, run = dropped(single, {"w": W}, X)
    keys = jax.random.split(KEY, 3)
    with_key = lambda key, x: run(lora_jax.with_dropout(params, key), x)
    got = jax.vmap(with_key)(keys, X)
    want = jnp.stack([with_key(key, x) for key, x in zip(keys, X, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_steps_of_a_loop_drop_the_same_inputs(quick_compile):
    fn = lambda params, x: lax.scan(lambda c, _: (c, inner(params["w"], x)), 0, None, length=2)[1]
    params, run = dropped(fn, {"w": W}, X)
    first, second = run(params, X)
    np.testing.assert_array_equal(first, second)
