"""The optimizers that know A from B, and trees of all layouts for them."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax import Layout, LoraWeight
from tests.programs import normal

#: By name: a function of a learning rate and adapted parameters.
OPTIMIZERS = {
    "riemannian_sgd": lambda rate, params: lora_jax.riemannian(optax.sgd(rate), params),
    "riemannian_adamw": lambda rate, params: lora_jax.riemannian(
        optax.adamw(rate, weight_decay=0.1), params, damping=0.1
    ),
    "lora_rite": lambda rate, params: lora_jax.lora_rite(rate, params, weight_decay=0.1),
    "lora_muon": lambda rate, params: lora_jax.lora_muon(rate, params, weight_decay=0.1),
}


def each(*default):
    """Parametrize a test by `name`: these optimizers by default, the others in test-all."""
    names = [x if x in default else pytest.param(x, marks=pytest.mark.slow) for x in OPTIMIZERS]
    return pytest.mark.parametrize("name", names)


#: By the layout of a weight, its shape: attention out and in, experts in stacked layers, a batch
#: axis in the middle, a convolution.
SHAPES = {
    "ioo": (6, 2, 3),
    "iio": (2, 3, 5),
    "bbio": (2, 1, 4, 5),
    "ibo": (6, 2, 5),
    "iiio": (3, 2, 2, 5),
}


def weight(layout, shape, rank, seed=0, b_zero=False, dtype=jnp.float32, scale=1.5):
    """An adapter without its base, with the factors of `seed`."""
    layout = Layout(layout)
    a = normal(seed, layout.a_shape(shape, rank), dtype)
    b = normal(seed + 1, layout.b_shape(shape, rank), dtype)
    scales = jnp.full(layout.select("b", shape), scale, jnp.float32)
    return LoraWeight(None, a, b * (not b_zero), scales, layout=layout)


def product(node):
    """A·B of a weight with layout "io"."""
    return node.a @ node.b


def distance(params):
    """A loss of products: how far scale·A·B is from a fixed matrix, per adapter of layout "io"."""
    nodes = [x for x in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(x)]
    total = 0.0
    for i, node in enumerate(nodes):
        shape = (node.a.shape[0], node.b.shape[1])
        update = node.scale.astype(node.a.dtype) * product(node)
        total += (jnp.cos(update - normal(20 + i, shape, node.a.dtype)) * update).sum()
    return total


def is_weight(x):
    return isinstance(x, LoraWeight)


def train(tx, params, steps, loss=distance, state=None):
    """Parameters and state after some steps in one compiled loop."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (lora_jax.apply_updates(params, updates), state), None

    state = tx.init(params) if state is None else state
    return jax.jit(lambda *carry: jax.lax.scan(step, carry, length=steps)[0])(params, state)


def moves(tx, slopes, params):
    """The updates of the first step, compiled."""
    return jax.jit(lambda slopes, params: tx.update(slopes, tx.init(params), params)[0])(
        slopes, params
    )


def padded(node, rank):
    """The same adapter with zero columns of A and rows of B up to a larger rank."""
    more = rank - node.rank
    a, b = jnp.pad(node.a, [(0, 0), (0, more)]), jnp.pad(node.b, [(0, more), (0, 0)])
    return dataclasses.replace(node, a=a, b=b)


def noise(seed, params):
    """Gradients for all leaves, the same for each leaf of a shape."""
    return jax.tree.map(lambda x: normal(seed, x.shape, x.dtype), params)
