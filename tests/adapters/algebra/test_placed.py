"""Adapters on a mesh, and in a Flax NNX model, come out of the algebra as they went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests.adapters.algebra.random_overlays import overlay, update
from tests.adapters.on_a_mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")
PLAIN = [
    lora_jax.LoraWeight(
        None, jnp.ones((8, 2)) * i, jnp.ones((2, 4)), jnp.float32(1), layout=lora_jax.Layout("io")
    )
    for i in (1, 2)
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_results_are_sharded_as_the_adapters_are(kind):
    mesh = make_mesh(kind, fsdp=2, tensor=2)
    specs = {"a": P("fsdp"), "b": P(None, "tensor"), "scale": P()}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))

    def place(node):
        arrays = {field: put(getattr(node, field), spec) for field, spec in specs.items()}
        return {"w": lora_jax.LoraWeight(None, **arrays, layout=node.layout)}

    placed = [place(node) for node in PLAIN]
    results = {
        "cat": lora_jax.combine(placed, [2, -1]),
        "svd": lora_jax.combine(placed, [2, -1], method="svd"),
        "compress": lora_jax.compress(placed[0], 1)[0],
    }
    for name, got in results.items():
        for field in ("a", "b"):
            spec = getattr(got["w"], field).sharding.spec
            assert spec[: len(specs[field])] == (*specs[field],), name
    np.testing.assert_allclose(update(results["cat"]["w"]), np.zeros((8, 4)), atol=1e-6)
    np.testing.assert_allclose(update(results["compress"]["w"]), np.full((8, 4), 2), atol=1e-5)


def test_models_of_flax_nnx():
    net = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    config = lora_jax.LoraConfig(rank=2, targets=["kernel"], bias="all")
    adapted = lora_jax.init(jax.random.key(0), net, config)
    base, adapters = lora_jax.split(adapted)
    moved = jax.tree.map(lambda x: x + 0.5 if x.ndim else x, adapters)
    got = lora_jax.combine([moved, moved], [2, -1], base=base)
    without = lora_jax.combine([moved, moved], [2, -1])  # the weights of the biases add up to 1
    x = jnp.ones((1, 6))
    want = lora_jax.merge(lora_jax.join(base, moved))(x)
    for adapters in (got, without, lora_jax.compress(got, 2)[0]):
        y = lora_jax.merge(lora_jax.join(base, adapters))(x)
        np.testing.assert_allclose(y, want, atol=1e-5)


def test_dropout_that_is_on():
    """Keys of random numbers are no part of an adapter's meaning."""
    node = overlay(0, kinds=("linear",))["linear"]
    node = lora_jax.with_dropout({"w": jax.tree.map(lambda x: x, node)}, jax.random.key(0))["w"]
    assert lora_jax.combine([{"w": node}, {"w": node}])["w"].key is None
