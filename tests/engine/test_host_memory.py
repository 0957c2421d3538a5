"""A base that is kept in host memory, and moved to the device inside the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

import lora_jax
from lora_jax import LoraConfig
from tests.programs import merged, normal, randomize

X = normal(0, (3, 6), jnp.float32)
PUT = {
    "a space": lambda w: jax.device_put(w, jax.memory.Space.Device),
    "a sharding": lambda w: jax.device_put(w, SingleDeviceSharding(jax.devices()[0])),
}


def on_host(w):
    return jax.device_put(w, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def memory(x):
    return x.sharding.memory_kind


CONFIGS = {
    "factors": LoraConfig(2, targets=["w"]),
    "dora": LoraConfig(2, targets=["w"], dora=True),
    "trained fully": LoraConfig(2, targets=[], train=["w"]),
    "trained rows": LoraConfig(2, targets=[], rows={"w": (1,)}, overrides={"w": {"rows_axis": 0}}),
}


@pytest.mark.parametrize("put", PUT.values(), ids=PUT)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_weight(put, config, quick_compile):
    fn = lambda params, x: jnp.tanh(x @ put(params["w"]))
    params = {"w": on_host(normal(1, (6, 5), jnp.float32))}
    assert lora_jax.init(jax.random.key(0), params, LoraConfig(2), fn, X)["w"].layout.axes == "io"
    adapted = randomize(lora_jax.init(jax.random.key(0), params, config, fn, X))
    assert memory(adapted["w"].w) == "pinned_host"
    base, adapters = lora_jax.split(adapted)
    run = lora_jax.lora(fn, on_dense="error")
    loss = lambda adapters, base: run(lora_jax.join(base, adapters), X).sum()
    grads = jax.jit(jax.grad(loss))(adapters, base)
    assert {memory(x) for x in jax.tree.leaves(grads)} == {"device"}
    for plain in (lora_jax.merge(adapted), jax.jit(lora_jax.merge)(adapted)):
        assert memory(plain["w"]) == "pinned_host"
        np.testing.assert_allclose(run(adapted, X), fn(plain, X), atol=1e-5)
    if config is CONFIGS["factors"]:
        here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), adapted)
        np.testing.assert_allclose(jax.jit(run)(adapted, X), fn(merged(here), X), atol=1e-5)


def test_a_stack_in_a_scan_and_a_checkpoint(quick_compile):
    """Each layer is moved when it is needed."""

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ PUT["a space"](w)), None

    fn = lambda params, x: lax.scan(layer, x, params["w"])[0]
    stack = normal(1, (3, 6, 6), jnp.float32)
    adapted = lora_jax.init(jax.random.key(0), {"w": on_host(stack)}, LoraConfig(2), fn, X)
    assert adapted["w"].layout.axes == "bio"
    adapted = randomize(adapted)
    plain = lora_jax.merge(adapted)
    assert memory(plain["w"]) == "pinned_host"
    here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), adapted)
    want = merged(here)
    np.testing.assert_allclose(plain["w"], want["w"], atol=1e-5)
    run = lora_jax.lora(fn, on_dense="error")
    np.testing.assert_allclose(jax.jit(run)(adapted, X), fn(want, X), atol=1e-5)
    jax.jit(jax.grad(lambda p: run(p, X).sum()))(adapted)


def test_a_weight_that_the_function_returns():
    fn = lambda params, x: (x @ PUT["a space"](params["w"]), params["w"])
    params = {"w": on_host(normal(1, (6, 5), jnp.float32))}
    adapted = randomize(lora_jax.init(jax.random.key(0), params, LoraConfig(2), fn, X))
    _, w = lora_jax.lora(fn, on_dense="allow")(adapted, X)
    assert memory(w) == "pinned_host"
    np.testing.assert_allclose(w, lora_jax.merge(adapted)["w"], atol=1e-6)
