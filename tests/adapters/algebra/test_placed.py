"""Adapters on a mesh, and in a Flax NNX model, come out of the algebra as they went in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.adapters.algebra.methods import METHODS
from tests.adapters.algebra.random_overlays import overlay, random_node, update
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


@pytest.mark.slow
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


def test_adapters_in_host_memory_stay_there():
    node = overlay(0, kinds=("conv",))["conv"]
    host = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), node)
    for verb in (lambda x: lora_jax.combine([x, x]), lambda x: lora_jax.compress(x, 1)[0]):
        got = verb({"w": host})["w"]
        assert jax.typeof(got.a).memory_space is jax.memory.Space.Host
        np.testing.assert_array_equal(got.b, verb({"w": node})["w"].b)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_stacked_layers_on_explicit_axes(how):
    """Layers, inputs and outputs are sharded; the results are those without a mesh."""
    mesh = make_mesh(AxisType.Explicit, fsdp=2, tensor=2)
    layers, spec = P("tensor"), {"a": P("tensor", "fsdp"), "b": P("tensor", None, "fsdp")}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    rng = np.random.default_rng(0)
    plain = [{"w": random_node(rng, "bio", (4, 8, 6), 2)} for _ in range(2)]
    w = jnp.asarray(rng.normal(size=(4, 8, 6)), jnp.float32)

    def place(node, **more):
        arrays = {field: put(getattr(node, field), spec[field]) for field in spec}
        scale = put(node.scale, layers)
        return {"w": dataclasses.replace(node, **arrays, scale=scale, **more)}

    placed, base = [place(nodes["w"]) for nodes in plain], {"w": put(w, spec["b"])}
    key = jax.random.key(0)
    for method, row in METHODS.items():
        options = {} if row.keeps == "all" else {"density": 0.5, "key": key}
        combine = lambda x, m=method, o=options: lora_jax.combine(x, [1, -2], method=m, **o)
        got = (jax.jit(combine) if how == "jit" else combine)(placed)["w"]
        np.testing.assert_allclose(update(got), update(combine(plain)["w"]), atol=2e-4)
        assert how == "jit" or got.a.sharding.spec == spec["a"]
    params = lora_jax.join(base, placed[0])
    reduced = lora_jax.reduce_intruders(params, 0.5, k=3, threshold=0.8)
    want = lora_jax.reduce_intruders(lora_jax.join({"w": w}, plain[0]), 0.5, k=3, threshold=0.8)
    np.testing.assert_allclose(update(reduced["w"]), update(want["w"]), atol=1e-4)
    magnitude = jnp.ones((4, 6))
    dora = place(plain[0]["w"], magnitude=put(magnitude, P("tensor", "fsdp")))
    got = lora_jax.combine([dora], [2], method="svd", rank=6, base=base)
    plain_dora = {"w": dataclasses.replace(plain[0]["w"], magnitude=magnitude)}
    want = lora_jax.combine([plain_dora], [2], method="svd", rank=6, base={"w": w})
    np.testing.assert_allclose(update(got["w"]), update(want["w"]), atol=1e-4)
    leaf = lambda x: {"w": lora_jax.TrainedLeaf(None, x, jnp.float32(1))}
    got = lora_jax.combine([leaf(put(w + 1, spec["b"]))], [2], base=base)["w"]
    np.testing.assert_allclose(got.value, w + 2, atol=1e-5)
    assert got.value.sharding.spec == spec["b"]
