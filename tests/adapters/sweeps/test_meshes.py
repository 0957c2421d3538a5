"""A sweep on a mesh of eight devices trains as on one, and its arrays stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

WIDTH, HIDDEN = 12, 20
SPECS = {"up": P(None, "model"), "down": P("model", None)}
RUNS = [
    lora.Run(learning_rate=1e-2, rank=2, dropout=0.1),
    lora.Run(learning_rate=1e-2, rank=4, dora=True),
    lora.Run(learning_rate=3e-2, rank=3),
]


def model(params, x):
    return (jnp.tanh(x @ params["up"]) @ params["down"]).mean()


def make_sweep(base, x):
    return lora.sweep(lora.lora(model), base, RUNS, lora.LoraConfig(), x, slots=2)


def train(base, x):
    """(losses, state): two runs, of which one is replaced."""
    sweep = make_sweep(base, x)
    state, first = sweep.step(sweep.init(), x)
    state, second = sweep.step(sweep.replace(state, 1, RUNS[2]), x)
    return np.array([first, second, sweep.evaluate(state, x)]), state


def arguments():
    """(base, x), and the same on a mesh."""
    keys = jax.random.split(jax.random.key(0), 3)
    base = {
        "up": jax.random.normal(keys[0], (WIDTH, HIDDEN)),
        "down": jax.random.normal(keys[1], (HIDDEN, WIDTH)),
    }
    x = jax.random.normal(keys[2], (8, WIDTH))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = {n: jax.device_put(w, NamedSharding(mesh, SPECS[n])) for n, w in base.items()}
    return (base, x), (placed, jax.device_put(x, NamedSharding(mesh, P("data"))))


def assert_lies_as_its_base(state):
    specs = jax.tree.map(lambda x: x.sharding.spec, state.adapters)
    assert specs["up"].b == P(None, None, "model") and specs["down"].a == P(None, "model")
    assert specs["up"].magnitude == P(None, "model") and specs["up"].a == P(None)
    moments = {x.sharding.spec for x in jax.tree.leaves(state.optimizer)}
    assert {P(None, None, "model"), P(None, "model"), P(None)} == moments


def test_new_states_lie_as_their_base():
    assert_lies_as_its_base(make_sweep(*arguments()[1]).init())


@pytest.mark.slow
def test_a_sweep_trains_on_a_mesh_as_on_one_device():
    whole, placed = arguments()
    want, alone = train(*whole)
    got, state = train(*placed)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert_lies_as_its_base(state)
    for got_leaf, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got_leaf, leaf, rtol=1e-4, atol=1e-5)
