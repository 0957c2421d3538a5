"""Stacks of every kind of tree and of weight: what was stacked comes back to the bit."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax.core.paths import flatten_with_paths
from tests.programs import normal

LEAVES = {
    "up": (64, 6),
    "layers": (3, 6, 4),
    "attention": (4, 2, 3),
    "conv": (3, 3, 2, 4),
    "embedding": (8, 4),
    "bias": (4,),
    "norms": (3, 4),
}
LAYOUTS = {"up": "io", "layers": "bio", "attention": "ioo", "conv": "iiio"}


def values(*shape):
    return normal(sum(shape), shape, jnp.float32)


def lora_node(name, rank, magnitude=False, scale=2.0, **options):
    shape, layout = LEAVES[name], lora.Layout(LAYOUTS[name])
    return lora.LoraWeight(
        None,
        values(*layout.a_shape(shape, rank)),
        values(*layout.b_shape(shape, rank)),
        jnp.asarray(np.full(layout.select("b", shape), scale, np.float32)),
        values(*layout.magnitude_shape(shape)) if magnitude else None,
        layout=layout,
        **options,
    )


ROWS = lora.TrainedRows(
    None, values(2, 4), jnp.float32(1), rows=(1, 5), axis=0, layout=lora.Layout("io")
)
RESTRICTED = dataclasses.replace(lora_node("layers", 2), scale=jnp.array([1.5, 0.0, 1.5]))
SOME_LAYERS = jnp.array([1.0, 0.0, 1.0])[:, None]
#: What each adapter has at the leaves of these names.
ADAPTERS = [
    {"up": lora_node("up", 1, dropout=0.1234567), "layers": RESTRICTED},
    {name: lora_node(name, 3, magnitude=True) for name in LAYOUTS},
    {
        "up": lora_node("up", 2, scale=3.5),
        "layers": lora_node("layers", 4),
        "bias": lora.TrainedLeaf(None, values(4), jnp.float32(1)),
        "norms": lora.TrainedLeaf(None, values(3, 4), SOME_LAYERS),
        "embedding": ROWS,
    },
    {  # switched off, which is not the same as absent
        "bias": lora.TrainedLeaf(None, jnp.zeros(4), jnp.float32(0)),
        "norms": lora.TrainedLeaf(None, jnp.zeros((3, 4)), 0 * SOME_LAYERS),
    },
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
    "quantized": lambda leaves: lora.quantize(leaves, "int8", targets=["up"]),
}


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(x, y)


def shapes(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


OFTEN = ("dict", "Linen", "NNX module", "Equinox", "quantized")


@pytest.mark.parametrize(
    "name", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.slow) for x in TREES]
)
def test_what_was_stacked_comes_back(name):
    base = TREES[name]({k: jnp.ones(shape) for k, shape in LEAVES.items()})
    paths, treedef = flatten_with_paths(base)
    overlays = [
        jax.tree.unflatten(treedef, [nodes.get(path.split("/")[-1]) for path in paths])
        for nodes in ADAPTERS
    ]
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
