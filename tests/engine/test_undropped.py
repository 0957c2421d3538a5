"""Dropout without a key in a gradient: one warning, and none elsewhere."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig
from tests.programs import normal, randomize

KEY = jax.random.key(0)
X = normal(0, (5, 4), jnp.float32)
BASE = {"up": {"kernel": normal(1, (4, 6), jnp.float32)}, "down": {"kernel": jnp.ones((6, 4))}}


def model(params, x):
    return x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def adapted(dropout):
    return randomize(lora_jax.init(KEY, BASE, LoraConfig(rank=2, dropout=dropout), model, X))


def loss(apply):
    return lambda params: (apply(params, X) ** 2).mean()


GRADIENTS = {
    "grad": lambda apply: jax.grad(loss(apply)),
    "jit_grad": lambda apply: jax.jit(jax.grad(loss(apply))),
    "grad_jit": lambda apply: jax.grad(loss(jax.jit(apply))),
    "remat": lambda apply: jax.grad(loss(jax.checkpoint(apply))),
    "vmap": lambda apply: (
        lambda p: jax.vmap(jax.grad(lambda p, x: apply(p, x).sum()), (None, 0))(p, X[:, None])
    ),
    "linearize": lambda apply: lambda p: jax.linearize(loss(apply), p)[0],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_warning(name):
    apply = lora_jax.lora(model)
    gradient = GRADIENTS[name](apply)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        got = gradient(adapted(0.5))
        gradient(adapted(0.5))
    (one,) = found
    assert "down/kernel: the configuration asks for dropout=0.5" in str(one.message)
    assert "with_dropout(params, key)" in str(one.message)
    want = GRADIENTS[name](lora_jax.lora(model))(adapted(0.0))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


def test_no_warning_elsewhere():
    apply = lora_jax.lora(model)
    params = adapted(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(params, X)
        jax.jit(apply)(params, X)
        jax.grad(lambda x: apply(params, x).sum())(X)  # with respect to the input alone
        jax.grad(lambda p: loss(apply)(lora_jax.with_dropout(p, KEY)), allow_int=True)(params)
        jax.grad(loss(apply))(adapted(0.0))
        jax.eval_shape(apply, params, X)
