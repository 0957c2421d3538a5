"""A batch with many adapters on eight devices: the numbers of one, and the frozen collectives."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from tests import devices

devices.some(8)

ROWS, TIME, WIDTH, HIDDEN = 8, 4, 16, 32
IDS = jnp.array([0, 1, 2, -1, 3, 1, 0, 2], jnp.int32)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, jnp.float32)


BASE = {"up": draw(0, 2, WIDTH, HIDDEN), "down": draw(1, 2, HIDDEN, WIDTH)}
X = draw(2, ROWS, TIME, WIDTH)


def step(x, ws):
    return x + jnp.tanh(x @ ws["up"]) @ ws["down"], None


def model(params, x):
    return lax.scan(step, x, params)[0]


def explicit(params, x):
    """Sum what no axis of a mesh divides, as explicit axes ask for."""
    for i in range(2):
        x = jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return x


@pytest.fixture(scope="module")
def overlays():
    config = lora.LoraConfig(rank=2, alpha=4)
    params = [lora.init(jax.random.key(n), BASE, config, model, X) for n in range(4)]
    noise = lambda x: x + draw(3, *x.shape) / 4 if x.ndim > 2 else x
    return [jax.tree.map(noise, lora.split(x)[1]) for x in params]


def collectives(compiled):
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf"({names})\(", compiled.as_text()))


def placed(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def mixed(fn):
    return lambda base, stack, x, ids: lora.lora(fn, adapters_of=ids)(lora.join(base, stack), x)


SPECS = {
    "fsdp": {"up": (None, "data", "model"), "down": (None, "model", "data")},
    "tensor": {"up": (None, None, "model"), "down": (None, "model", None)},
}


@pytest.mark.parametrize("specs", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)], ids=str)
def test_rows_on_a_mesh_send_what_the_frozen_model_sends(specs, overlays):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    base = {name: placed(mesh, w, *SPECS[specs][name]) for name, w in BASE.items()}
    stack, x, ids = lora.stack(overlays), placed(mesh, X, "data"), placed(mesh, IDS, "data")
    run = jax.jit(mixed(model)).lower(base, stack, x, ids).compile()
    frozen = jax.jit(model).lower(base, x).compile()
    assert collectives(run) == collectives(frozen)
    want = jax.jit(mixed(model))(BASE, stack, X, IDS)
    np.testing.assert_allclose(run(base, stack, x, ids), want, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_gradients_of_rows_on_a_mesh(kind, overlays):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    fn = model if kind == AxisType.Auto else explicit
    specs = SPECS["fsdp"] if kind == AxisType.Auto else {"up": (), "down": ()}
    base = {name: placed(mesh, w, *specs[name]) for name, w in BASE.items()}
    stack = lora.stack(overlays)

    def grads(base, stack, x, ids):
        loss = lambda stack, x: (mixed(fn)(base, stack, x, ids) ** 2).sum()
        return jax.grad(loss, (0, 1))(stack, x)

    want = jax.jit(grads)(BASE, stack, X, IDS)
    on_mesh = jax.tree.map(lambda x: placed(mesh, x), stack)
    with jax.set_mesh(mesh):
        got = jax.jit(grads)(base, on_mesh, placed(mesh, X, "data"), placed(mesh, IDS, "data"))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=0, atol=2e-5)
