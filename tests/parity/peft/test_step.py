"""One optimisation step against recorded runs of peft 0.21.2: outputs, gradients, A and B after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.parity.peft import steps

pytestmark = pytest.mark.usefixtures("quick_compile")
VARIANTS = ["lora", "rslora", "dora"]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=list(steps.KINDS))
def kind(request):
    return request.param


def trained(params):
    node = params["w"]
    return {"a": node.a, "b": node.b} | ({} if node.magnitude is None else {"m": node.magnitude})


@functools.cache
def measured(kind, variant):
    """Return the recorded numbers, the initial parameters, and our output, loss and gradients."""
    want = steps.numbers(kind, variant)
    params = steps.params_of(kind, want)
    adapted = lora_jax.lora(functools.partial(steps.layer, kind), on_dense="error")

    def loss(params, x):
        y = adapted(params, x)
        return ((y - want["target"]) ** 2).mean(), y

    # ids have no gradient
    of = (0, 1) if jnp.issubdtype(want["x"].dtype, jnp.floating) else (0,)
    (value, y), grads = jax.jit(jax.value_and_grad(loss, of, has_aux=True))(params, want["x"])
    return want, params, value, y, grads


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_merged_weight(kind, variant):
    want, params, value, y, _ = measured(kind, variant)
    close(y, want["y"])
    close(value, want["loss"])
    close(lora_jax.merge(params)["w"], want["merged"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale(kind, variant):
    """The configuration gives PEFT's scale."""
    scaling = "rslora" if variant == "rslora" else "standard"
    config = lora_jax.LoraConfig(rank=3, alpha=6, scaling=scaling)
    np.testing.assert_allclose(config.for_path("w").scale, steps.numbers(kind, variant)["scale"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(kind, variant):
    want, *_, grads = measured(kind, variant)
    for name, grad in trained(grads[0]).items():
        close(grad, want[f"grad_{name}"])
    for grad in grads[1:]:
        close(grad, want["grad_x"])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_one_step(kind, variant):
    want, params, *_, grads = measured(kind, variant)
    for name, rate in (("sgd", steps.SGD_RATE), ("adam", steps.ADAM_RATE)):
        tx = lora_jax.freeze(getattr(optax, name)(rate), params)
        step = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])
        after = optax.apply_updates(params, step(grads[0], params))
        for field, value in trained(after).items():
            close(value, want[f"{name}_{field}"])
        np.testing.assert_array_equal(after["w"].w, want["w"])


def test_dora_starts_where_peft_does(kind):
    want = steps.numbers(kind, "dora")
    config = lora_jax.LoraConfig(rank=3, dora=True, overrides={"w": {"layout": steps.KINDS[kind]}})
    params = lora_jax.init(jax.random.key(0), {"w": want["w"]}, config)
    close(params["w"].magnitude, want["m_start"])
