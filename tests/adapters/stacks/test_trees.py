"""Stacks of every kind of tree and of weight: what was stacked comes back to the bit."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora

LEAVES = {
    "up": (4, 6),
    "layers": (3, 6, 4),
    "attention": (4, 2, 3),
    "conv": (3, 3, 2, 4),
    "embedding": (8, 4),
    "bias": (4,),
}
LAYOUTS = {
    "layers": lora.Override(layout="bio"),
    "attention": lora.Override(layout="ioo"),
    "conv": lora.Override(layout="iiio"),
}
TARGETS = ["up", "layers", "attention", "conv"]
CONFIGS = [
    lora.LoraConfig(rank=1, targets=["up"], dropout=0.1234567),
    lora.LoraConfig(rank=3, targets=TARGETS, overrides=LAYOUTS, dora=True),
    lora.LoraConfig(
        rank=2,
        targets=TARGETS[:2],
        overrides={"layers": LAYOUTS["layers"]},
        scaling="rslora",
        alpha=5,
        train=["bias"],
        rows={"embedding": [1, 5]},
    ),
    lora.LoraConfig(
        rank=2,
        targets=["layers"],
        overrides={"layers": LAYOUTS["layers"]},
        layers=[0, 2],
        layers_pattern="layers",
        dtype=jnp.float32,
    ),
]


class Net(eqx.Module):
    leaves: dict
    act: object = jnp.tanh


def linen(leaves):
    names = {k: (*"abcdef"[: x.ndim],) for k, x in leaves.items()}
    return {name: nn.Partitioned(x, names=names[name]) for name, x in leaves.items()}


def module(leaves):
    class Model(nnx.Module):
        def __init__(self):
            for name, x in leaves.items():
                setattr(self, name, nnx.Param(x))

    return Model()


TREES = {
    "dict": lambda leaves: leaves,
    "tuple": lambda leaves: (None, [leaves], ()),
    "Haiku": lambda leaves: {"net/~/linear": leaves},
    "Linen": linen,
    "NNX module": module,
    "NNX state": lambda leaves: nnx.state(module(leaves)),
    "Equinox": Net,
    "quantized": lambda leaves: lora.quantize(
        leaves | {"up": jnp.ones((64, 6))}, "int8", targets=["up"]
    ),
}


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(x, y)


def shapes(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", TREES)
def test_what_was_stacked_comes_back(name):
    base = TREES[name]({k: jnp.ones(shape) for k, shape in LEAVES.items()})
    overlays = []
    for i, config in enumerate(CONFIGS):
        params = lora.init(jax.random.key(i), base, config)
        overlays.append(lora.split(params)[1])
    stack = lora.stack(overlays)
    for got, want in zip(lora.unstack(stack), overlays, strict=True):
        equal(got, want)
    joined = lora.join(base, stack)
    for got, want in zip(lora.unstack(joined), overlays, strict=True):
        equal(lora.split(got)[1], want)
        equal(lora.split(got)[0], base)
    moved = lora.set_slot(lora.set_slot(stack, 0, overlays[1]), 1, lora.select(stack, -1))
    one, none, *_ = lora.unstack(moved)
    equal(one, overlays[1])
    assert not jax.tree.leaves(none)
    assert shapes(lora.stack(jax.eval_shape(lambda: overlays))) == shapes(stack)
