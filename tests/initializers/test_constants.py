"""Leaves and arguments that are no arrays: what `init` accepts, the others accept."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.programs import normal

KEY = jax.random.key(0)
X, Y = normal(0, (6, 4), jnp.float32), normal(1, (6, 4), jnp.float32)
MODEL = eqx.nn.MLP(4, 4, 8, 1, key=KEY)  # its activation function is a leaf
ARRAYS, STATIC = eqx.partition(MODEL, eqx.is_array)
CONFIG = lora_jax.LoraConfig(rank=2)


def call(model, x, mode):
    return jax.vmap(model)(x) * {"twice": 2.0, "once": 1.0}[mode]


def whole():
    return call, lora_jax.init(KEY, MODEL, CONFIG, call, X, "twice")


def parts():
    fn = lambda arrays, x, mode: call(eqx.combine(arrays, STATIC), x, mode)
    return fn, lora_jax.init(KEY, ARRAYS, CONFIG, fn, X, "twice")


def loss_of(fn):
    return lambda params, x, mode: ((fn(params, x, mode) - Y) ** 2).mean()


def adapted_eva(fn, params):
    return lora_jax.eva(fn, params, [(X, "twice"), (X, "once")])


def adapted_lora_ga(fn, params):
    return lora_jax.lora_ga(loss_of(fn), params, [(X, "twice"), (X, "once")])


@pytest.mark.parametrize("verb", [adapted_eva, adapted_lora_ga])
def test_a_whole_equinox_model_equals_its_arrays(verb):
    got, want = verb(*whole()), verb(*parts())
    assert got.activation is MODEL.activation
    found = [x for x in jax.tree.leaves(got) if eqx.is_array(x)]
    for g, w in zip(found, jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


def test_memory_report():
    reports = []
    for fn, params in (whole(), parts()):
        reports.append(lora_jax.memory_report(loss_of(lora_jax.lora(fn)), params, X, "once"))
    assert reports[0] == reports[1]
