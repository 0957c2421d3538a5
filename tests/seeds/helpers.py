"""What the four files share. Oracles are in numpy, which has nothing to compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraConfig
from tests.programs import is_node

KEY = jax.random.key(0)
ONE = jnp.float32(1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


@functools.cache
def make(module, *sizes, **options):
    """The parameters that a layer's `init` makes."""
    return jax.jit(lambda key: module.init(key, *sizes, **options))(KEY)


def with_b(params):
    """The same parameters with a B that training has moved away from zero."""
    move = lambda n: dataclasses.replace(n, b=normal(1, *n.b.shape)) if is_node(n) else n
    return jax.tree.map(move, params, is_leaf=is_node)


def factors(node):
    """W, A, B and the scale of an adapted weight, for numpy."""
    return [np.asarray(x) for x in (node.w, node.a, node.b, node.scale)]


#: A network of three layers with nothing else in it, and an input.
WIDE = {f"layer_{i}": normal(i, 128, 128) / 11 for i in range(3)}
X = jnp.ones((8, 128))


def wide(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x


@functools.cache
def adapted_wide():
    """The network with adapters of rank 2."""
    start = jax.jit(lambda p: lora_jax.init(KEY, p, LoraConfig(rank=2), wide, X))
    _, adapters = lora_jax.split(with_b(start(WIDE)))
    return lora_jax.join(WIDE, adapters)


def flops(fn, *args):
    """Operations of a program, as they are counted before it is compiled."""
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]
