"""Every optimizer's first steps against optax or NumPy on the bare arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import lora_jax as lora
from lora_jax.training.errors import TrainingError
from lora_jax.training.optimizer import Optimizer
from lora_jax.training.optimizers.kinds import KINDS

RATE, DECAY, STEPS = 0.1, 0.02, 3
SHAPES = {"heads": ("bioo", (2, 5, 2, 2)), "dense": ("io", (4, 3))}


@functools.cache
def start():
    """Return adapters of all layouts, a fully trained matrix, head and norm; and gradients."""
    base = {name: {"kernel": jnp.ones(shape)} for name, (_, shape) in SHAPES.items()}
    base |= {"whole": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 4))}}
    base["norm"] = {"scale": jnp.ones(4)}
    overrides = {f"{name}/kernel": {"layout": axes} for name, (axes, _) in SHAPES.items()}
    config = lora.LoraConfig(
        rank=2, targets=[*overrides], overrides=overrides, train=["whole", "head", "norm"]
    )
    _, adapters = lora.split(lora.init(jax.random.key(0), base, config))
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    adapters = jax.tree.map(
        lambda x, trains: draw(x) if trains else x, adapters, lora.mask(adapters)
    )
    return adapters, [jax.tree.map(draw, adapters) for _ in range(STEPS)]


def arrays(tree, by_layer=True):
    """Return what trains of a tree like the adapters, by name: as a matrix per layer, or whole."""
    found = {}
    for name, (axes, _) in SHAPES.items():
        node = tree[name]["kernel"]
        if not by_layer:
            found[f"{name} a"], found[f"{name} b"] = node.a, node.b
            continue
        for layer in range(2) if axes[0] == "b" else [None]:
            a, b = (x if layer is None else x[layer] for x in (node.a, node.b))
            found[f"{name} {layer} a"], found[f"{name} {layer} b"] = (
                a.reshape(-1, 2),
                b.reshape(2, -1),
            )
    leaves = {"whole": "kernel", "head": "kernel", "norm": "scale"}
    return found | {name: tree[name][leaf].value for name, leaf in leaves.items()}


def run(tx, params, gradients, apply=lora.apply_updates):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = apply(params, updates)
    return params


def lion():
    """Compute Lion's three steps in NumPy, from https://arxiv.org/abs/2302.06675, algorithm 2."""
    params, gradients = start()
    values = {n: np.asarray(x, np.float64) for n, x in arrays(params).items()}
    momentum = dict.fromkeys(values, 0.0)
    for gradient in gradients:
        for name, g in arrays(gradient).items():
            g = np.asarray(g, np.float64)
            step = np.sign(0.9 * momentum[name] + 0.1 * g)
            momentum[name] = 0.99 * momentum[name] + 0.01 * g
            values[name] = values[name] - RATE * (step + DECAY * values[name])
    return values


def adamw():
    params, gradients = start()
    values = {n: np.asarray(x, np.float64) for n, x in arrays(params).items()}
    first, second = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0)
    for t, gradient in enumerate(gradients, start=1):
        for name, g in arrays(gradient).items():
            g = np.asarray(g, np.float64)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            ratio = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            values[name] = values[name] - RATE * (ratio + DECAY * values[name])
    return values


def sgd():
    params, gradients = start()
    values = {n: np.asarray(x, np.float64) for n, x in arrays(params).items()}
    for gradient in gradients:
        for name, g in arrays(gradient).items():
            values[name] = values[name] - RATE * (np.asarray(g) + DECAY * values[name])
    return values


def adafactor():
    """Let optax decay first: its own decay is not multiplied by the rate."""
    params, gradients = start()
    tx = optax.adafactor(RATE, multiply_by_parameter_scale=False)
    apply = lambda params, updates: jax.tree.map(
        lambda x, u: x - RATE * DECAY * x + u, params, updates
    )
    return run(tx, arrays(params, False), [arrays(g, False) for g in gradients], apply)


def muon():
    params, gradients = start()
    axes = lambda name: None if name in ("head", "norm") else contrib.MuonDimensionNumbers()
    tx = contrib.muon(
        RATE,
        weight_decay=DECAY,
        adam_weight_decay=DECAY,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={name: axes(name) for name in arrays(params)},
    )
    return run(tx, arrays(params), [*map(arrays, gradients)], optax.apply_updates)


EXPECTED = {"adamw": adamw, "lion": lion, "sgd": sgd, "adafactor": adafactor, "muon": muon}
CONSTANT = optax.constant_schedule(RATE)
OURS = {
    "lora-rite": lambda params: lora.lora_rite(CONSTANT, params, weight_decay=DECAY),
    "lora-muon": lambda params: lora.lora_muon(CONSTANT, params, weight_decay=DECAY),
    "riemannian": lambda params: lora.riemannian(optax.adamw(CONSTANT, weight_decay=DECAY), params),
}


def optimizer(name, **more):
    return Optimizer(RATE, "constant", warmup=0, clip=0, weight_decay=DECAY, name=name, **more)


@pytest.mark.parametrize("name", EXPECTED)
def test_three_steps(name):
    params, gradients = start()
    found = run(optimizer(name).transformation(params, STEPS), params, gradients)
    expected, by_layer = EXPECTED[name](), name != "adafactor"  # which clips array by array
    before = arrays(params, by_layer)
    for path, x in arrays(found, by_layer).items():
        np.testing.assert_allclose(x, expected[path], rtol=2e-4, atol=2e-5, err_msg=path)
        assert np.abs(x - before[path]).max() > 1e-3
    for name in SHAPES:
        np.testing.assert_array_equal(found[name]["kernel"].scale, params[name]["kernel"].scale)


@pytest.mark.parametrize("name", OURS)
def test_those_of_lora_jax_are_themselves(name):
    """Their numbers have tests of their own; here the programs are the same, to the letter."""
    assert EXPECTED.keys() | OURS.keys() == KINDS.keys()
    params, _ = start()
    params = {"dense": params["dense"], "norm": params["norm"]}
    tx = [
        optimizer(name).transformation(params, STEPS),
        optax.chain(optax.identity(), OURS[name](params)),
    ]
    programs = [jax.make_jaxpr(one.update)(params, one.init(params), params) for one in tx]
    assert str(programs[0]) == str(programs[1]) and len(str(programs[0])) > 1000


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_b_has_its_rate(name):
    """At the first step all updates are proportional to the rate."""
    params, gradients = start()
    more = {"name": name, "warmup": 0, "clip": 0}
    one, four = (
        run(Optimizer(RATE, **more, b_ratio=r).transformation(params, 1), params, gradients[:1])
        for r in (1, 4)
    )
    for path, x in arrays(params).items():
        ratio = 4 if path.endswith(" b") else 1
        moved = [np.asarray(arrays(tree)[path]) - x for tree in (one, four)]
        np.testing.assert_allclose(moved[1], ratio * moved[0], rtol=1e-3, atol=1e-5, err_msg=path)


def test_what_is_refused():
    with pytest.raises(TrainingError, match=r"name must be one of .*adamw.*got 'adam'"):
        Optimizer(name="adam")
    for name in OURS:
        with pytest.raises(TrainingError, match=f"{name} updates A and B together"):
            Optimizer(name=name, b_ratio=4)
