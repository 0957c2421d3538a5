"""Decompositions of a weight that is sharded along explicit mesh axes: as on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from tests.programs import normal

KEY = jax.random.key(0)
W = normal(0, (8, 12), jnp.float32)
STACK = normal(1, (2, 8, 6), jnp.float32)
X = normal(2, (5, 8), jnp.float32)
SPECS = [P("m", "n")]
STACKED = {"overrides": {"stack": {"layout": "bio"}}}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("m", "n"), axis_types=(AxisType.Explicit,) * 2)


def placed(mesh, spec):
    tree = {"w": jax.device_put(W, NamedSharding(mesh, spec))}
    return tree | {"stack": jax.device_put(STACK, NamedSharding(mesh, P(None, *spec)))}


def update(node):
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    return np.einsum("...ir,...ro->...io", a, b)


def check_same(got, want, like):
    """A·B, because the signs of singular vectors are free; and the base, sharded as before."""
    for name in like:
        np.testing.assert_allclose(update(got[name]), update(want[name]), atol=1e-4)
        np.testing.assert_allclose(got[name].w, np.asarray(want[name].w), atol=1e-4)
        assert got[name].w.sharding.is_equivalent_to(like[name].sharding, like[name].ndim)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["pissa", "olora", "loftq"])
def test_initializers(mesh, spec, name):
    config = LoraConfig(rank=2, init=name, **STACKED)
    tree = placed(mesh, spec)
    want = lora_jax.init(KEY, {"w": W, "stack": STACK}, config)
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            check_same(lora_jax.init(KEY, tree, config), want, tree)
    check_same(jax.jit(lambda tree: lora_jax.init(KEY, tree, config))(tree), want, tree)


@pytest.mark.parametrize("exact", [False, True])
def test_extract(mesh, exact):
    change = normal(3, (8, 2), jnp.float32) @ normal(4, (2, 12), jnp.float32)
    base = {"w": placed(mesh, P(None, "m"))["w"]}
    tuned = {"w": base["w"] + jax.device_put(change, base["w"].sharding)}
    overlay, missed = lora_jax.extract(base, tuned, 2, exact=exact)
    np.testing.assert_allclose(update(overlay["w"]), change, atol=1e-4)
    assert missed["w"] < 1e-5


def test_lora_ga(mesh):
    def loss(params, x):
        y = jnp.einsum("bi,io->bo", x, params["w"], out_sharding=spec)
        return (y**2).mean()

    config = LoraConfig(rank=2, targets=["w"])
    spec = None
    want = lora_jax.lora_ga(loss, lora_jax.init(KEY, {"w": W}, config), [(X,)])
    spec = NamedSharding(mesh, P(None, None))
    tree = {"w": placed(mesh, P(None, "m"))["w"]}
    x = jax.device_put(X, NamedSharding(mesh, P()))
    got = lora_jax.lora_ga(loss, lora_jax.init(KEY, tree, config), [(x,)])
    check_same(got, want, tree)


def test_files(mesh, tmp_path):
    tree = placed(mesh, P(None, "m"))
    params = lora_jax.init(KEY, tree, LoraConfig(rank=2, **STACKED))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            lora_jax.save(tmp_path / "a", params)
            lora_jax.load(tmp_path / "a", tree)
    lora_jax.load(tmp_path / "a", {"w": W, "stack": STACK})
    with pytest.raises(lora_jax.AdapterFileError, match="w: other values"):
        lora_jax.load(tmp_path / "a", tree | {"w": -tree["w"]})
