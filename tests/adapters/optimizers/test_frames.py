"""Optimizers that know A from B under nnx.Optimizer, on a mesh, on a quantized base."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax import LoraConfig
from tests.adapters.on_a_mesh import KEY, product, put
from tests.adapters.optimizers.cases import OPTIMIZERS, each, weight
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")
X = normal(0, (6, 4), jnp.float32)


def call(model, x):
    return model(x)


@each()
def test_nnx_optimizer(name):
    """Three updates of a model; the same numbers as those of its arrays alone."""
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), jnp.tanh, nnx.Linear(8, 3, rngs=rngs))
    net = lora_jax.init(jax.random.key(0), net, LoraConfig(rank=2, bias="all"), call, X)
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    objective = lambda net: ((lora_jax.lora(call)(net, X) - 1) ** 2).mean()

    def by_hand(params):
        tx = OPTIMIZERS[name](0.05, params)
        state = tx.init(params)
        for _ in range(3):
            gradients = jax.grad(lambda p: objective(nnx.merge(graph, p, rest)))(params)
            updates, state = tx.update(gradients, state, params)
            params = lora_jax.apply_updates(params, updates)
        return objective(nnx.merge(graph, params, rest))

    want = jax.jit(by_hand)(params)
    optimizer = nnx.Optimizer(net, OPTIMIZERS[name](0.05, net), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(objective)(net))

    before = objective(net)
    for _ in range(3):
        step(net, optimizer)
    np.testing.assert_allclose(objective(net), want, rtol=1e-5)
    assert want < before


@each()
def test_a_mesh(name):
    """One compilation, shardings that stay, and the numbers of one device."""
    base = {"up": put((8, 16), "fsdp", "tensor"), "down": put((16, 8), "tensor", "fsdp")}
    x = put((8, 8), "fsdp", seed=7)
    params = lora_jax.init(KEY, base, LoraConfig(rank=2, dora=True), product, x)
    alone, x_alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, x))
    tx, run = OPTIMIZERS[name](0.05, params), lora_jax.lora(product)

    @jax.jit
    def step(params, state, x):
        gradients = jax.grad(lambda p: (run(p, x) ** 2).mean())(params)
        updates, state = tx.update(gradients, state, params)
        return lora_jax.apply_updates(params, updates), state

    state = tx.init(params)
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    for _ in range(3):
        params, state = step(params, state, x)
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x, sharding: x.sharding == sharding, (params, state), before)
    assert jax.tree.all(after)
    tx = OPTIMIZERS[name](0.05, alone)
    state, step = tx.init(alone), jax.jit(step.__wrapped__)
    for _ in range(3):
        alone, state = step(alone, state, x_alone)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, alone)


@each()
def test_a_quantized_base(name):
    base = {"w": normal(1, (32, 16), jnp.float32)}
    fn, x = lambda p, x: x @ p["w"], normal(2, (4, 32), jnp.float32)
    quantized = lora_jax.quantize(base, "int8", fn, x)
    params = lora_jax.init(jax.random.key(0), quantized, LoraConfig(rank=2), fn, x)
    tx = OPTIMIZERS[name](0.05, params)

    @jax.jit
    def step(params, state):
        objective = lambda p: ((lora_jax.lora(fn)(p, x) - 1) ** 2).mean()
        value, gradients = jax.value_and_grad(objective, allow_int=True)(params)
        updates, state = tx.update(gradients, state, params)
        return lora_jax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]


def test_a_cpu_decomposes_one_matrix_at_a_time():
    """Batches of LAPACK's that run at once wait for each other forever, on as many cores."""
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[{"k": weight("bio", (2, 6, 5), 3)}] * 4)

    def update(params):
        tx = lora_jax.lora_rite(0.1, params)
        return tx.update(params, tx.init(params), params)

    program = jax.jit(jax.vmap(update)).trace(stack).lower(lowering_platforms=("cpu",)).as_text()
    calls = [line for line in program.splitlines() if "custom_call @lapack" in line]
    assert calls and all(re.search(r": \(tensor<3x3xf32>\) ->", line) for line in calls)
