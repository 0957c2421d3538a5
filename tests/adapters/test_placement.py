"""Where adapters lie on a mesh: as the axes of their weight, but those of the examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from lora_jax.files.naming import Entry, Naming
from tests.adapters.on_a_mesh import (
    CONFIG,
    KEY,
    MESH,
    WANTED,
    base,
    check,
    make_mesh,
    product,
    put,
    specs,
    values,
)


def test_init_places_by_the_rule_and_shardings_agrees():
    params = base()
    tree = lora_jax.init(KEY, params, CONFIG)
    check(tree)
    assert all(tree[name].w is params[name] for name in params)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    abstract = lora_jax.init(KEY, shapes, CONFIG)
    wanted = jax.tree.map(lambda x: x.sharding, tree)
    for found in (
        jax.tree.map(lambda x: x.sharding, abstract),
        lora_jax.shardings(tree),
        lora_jax.shardings(abstract),
        lora_jax.shardings(params, CONFIG),
        lora_jax.shardings(shapes, CONFIG),
        lora_jax.shardings(tree, fsdp="fsdp"),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert jax.tree.all(jax.tree.map(lambda x, y: x == y, found, wanted))
    nowhere = jax.tree.map(np.asarray, params)
    # eager, on one device: the same values to the bit, except the sums of the norms
    for got, want in zip(values(tree), values(lora_jax.init(KEY, nowhere, CONFIG)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


def test_under_jit_with_the_tree_of_shardings():
    params = base()
    out = lora_jax.shardings(params, CONFIG)
    tree = jax.jit(lambda p: lora_jax.init(KEY, p, CONFIG), out_shardings=out)(params)
    check(tree)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_fast", "olora", "loftq"])
def test_every_initializer(init):
    params = {name: x for name, x in base().items() if name in ("up", "stack")}
    config = LoraConfig(rank=2, init=init, overrides={"stack": {"layout": "bio"}})
    tree = lora_jax.init(KEY, params, config)
    got = specs(tree)
    for name in params:
        assert (got[name].a, got[name].b) == WANTED[name][:2]
        assert tree[name].w.sharding == params[name].sharding


def test_initializers_from_batches():
    params = {name: base()[name] for name in ("up", "down")}
    x = put((8, 8), "fsdp", seed=7)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, x)
    loss = lambda p, x: (product(p, x) ** 2).mean()
    for new in (
        lora_jax.eva(product, tree, [(x,)], rho=1),
        lora_jax.lora_ga(loss, tree, [(x,)]),
    ):
        got = specs(new)
        for name in params:
            assert (got[name].a, got[name].b) == WANTED[name][:2]
            assert new[name].w.sharding == params[name].sharding


def test_extract():
    params = {name: base()[name] for name in ("up", "down")}
    tuned = jax.tree.map(lambda x: x * 1.5, params)
    overlay, _ = lora_jax.extract(params, tuned, 2)
    got = specs(overlay)
    assert [(got[n].a, got[n].b) for n in params] == [WANTED[n][:2] for n in params]


def test_trained_rows():
    params = {"embedding": put((12, 8), "tensor", ("fsdp", "expert"))}
    config = LoraConfig(targets=[], rows={"embedding": [3, 5]})
    node = lora_jax.init(KEY, params, config)["embedding"]
    assert specs(node).value == (None, "expert")
    np.testing.assert_array_equal(node.value, np.asarray(params["embedding"])[[3, 5]])


def test_layers_left_out():
    params = {"stack": base()["stack"]}
    config = LoraConfig(rank=2, overrides={"stack": {"layout": "bio"}}, layers=[1])
    got = specs(lora_jax.init(KEY, params, config))["stack"]
    assert (got.a, got.b, got.scale) == (*WANTED["stack"][:2], ("expert",))


# --- Files ----------------------------------------------------------------------------------------

NAMING = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"), Entry("{*m}.bias", "{*m}/bias")))


@pytest.mark.parametrize("dora", [False, True])
def test_files(tmp_path, dora):
    whole = base()
    params = {name: {"kernel": whole[name]} for name in ("up", "down")}
    params["up"]["bias"] = whole["bias"]
    config = LoraConfig(rank=2, dora=dora, bias="all")
    tree = lora_jax.init(KEY, params, config)
    lora_jax.save(tmp_path / "a.safetensors", tree, config=config)
    lora_jax.peft.save(tmp_path / "peft", tree, NAMING, config=config)
    no_bias = lora_jax.init(KEY, params, dataclasses.replace(config, bias="none"))
    lora_jax.mlx.save(tmp_path / "mlx", no_bias, NAMING)
    for overlay in (
        lora_jax.load(tmp_path / "a.safetensors", params),
        lora_jax.peft.load(tmp_path / "peft", params, NAMING),
        lora_jax.mlx.load(tmp_path / "mlx", params, NAMING),
    ):
        got = specs(overlay)
        for name in ("up", "down"):
            assert (got[name]["kernel"].a, got[name]["kernel"].b) == WANTED[name][:2]
            np.testing.assert_array_equal(overlay[name]["kernel"].a, tree[name]["kernel"].a)
            if dora:
                assert got[name]["kernel"].magnitude == WANTED[name][2]
    named = lora_jax.load(tmp_path / "a.safetensors", params, fsdp=("tensor",))
    assert specs(named)["up"]["kernel"].a == ("fsdp", None)


def test_a_file_of_loralib(tmp_path):
    from lora_jax.files.disk import safetensors_file

    params = {"up": {"kernel": base()["up"]}}
    tensors = {"up.lora_A": np.ones((2, 8), "f4"), "up.lora_B": np.ones((16, 2), "f4")}
    safetensors_file.write(tmp_path / "l.safetensors", tensors)
    overlay = lora_jax.loralib.load(tmp_path / "l.safetensors", params, NAMING, alpha=2)
    got = specs(overlay)["up"]["kernel"]
    assert (got.a, got.b, got.scale) == (*WANTED["up"][:2], ())


# --- Other places ---------------------------------------------------------------------------------


def test_sizes_that_the_mesh_does_not_divide():
    def of(shape, *entries):
        w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*entries)))
        node = lora_jax.init(KEY, {"w": w}, LoraConfig(rank=2))["w"]
        return node.a.sharding.spec, node.b.sharding.spec

    assert of((7, 6), "tensor", "expert") == (P(), P(None, "expert"))
    assert of((8, 6), None, ("expert", "tensor")) == (P(), P())


def test_a_weight_on_no_mesh_beside_others_that_are():
    params = {"up": base()["up"], "norm": jnp.ones(8), "bias": np.ones(16, np.float32)}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2, train=["norm", "bias"]))
    assert tree["norm"].w is params["norm"] and tree["norm"].value.sharding.mesh == MESH
    found = lora_jax.shardings(tree)
    assert found["norm"].w == found["bias"].value == NamedSharding(MESH, P())
    bound = jax.device_put(jnp.ones(8), jax.devices()[1])  # to a device: it stays there
    tree = lora_jax.init(KEY, {**params, "norm": bound}, LoraConfig(rank=2, train=["norm"]))
    assert tree["norm"].value.devices() == {jax.devices()[1]}


def test_one_device():
    params = {"w": jnp.ones((8, 4))}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2))
    assert not tree["w"].a.committed
    assert lora_jax.shardings(tree)["w"].a == tree["w"].a.sharding
    abstract = jax.eval_shape(lambda: tree)
    assert lora_jax.shardings(abstract)["w"].b.device_set == {jax.devices()[0]}


def test_explicit_axes_are_known_under_tracing():
    mesh = make_mesh(AxisType.Explicit, fsdp=2, tensor=2)
    params = {"up": put((8, 16), "fsdp", "tensor", mesh=mesh)}
    make = lambda p: lora_jax.init(KEY, p, LoraConfig(rank=2))
    for node in (
        make(params)["up"],
        jax.jit(make)(params)["up"],
        jax.eval_shape(make, params)["up"],
    ):
        assert node.b.sharding.spec == P(None, "tensor")
        assert not any(node.a.sharding.spec)


def test_an_overlay():
    tree = lora_jax.init(KEY, base(), CONFIG)
    _, adapters = lora_jax.split(tree)
    found = lora_jax.shardings(adapters)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    assert jax.tree.all(jax.tree.map(lambda s, x: s == x.sharding, found, adapters))
