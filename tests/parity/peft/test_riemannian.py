"""Five steps of preconditioned SGD and AdamW against recorded runs of peft 0.21.2."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax

pytestmark = pytest.mark.usefixtures("quick_compile")
WANT = dict(np.load(pathlib.Path(__file__).parent / "recorded" / "riemannian.npz"))
LAYERS = ("up", "down")
RUNS = {
    "sgd_0.01": (optax.sgd(0.01), 0.01),
    "sgd_1": (optax.sgd(0.01), 1.0),
    "adamw_0.01": (optax.adamw(0.02, weight_decay=0.1), 0.01),
    "adamw_1": (optax.adamw(0.02, weight_decay=0.1), 1.0),
}


def start():
    def layer(name):
        w, a, b = (jnp.asarray(WANT[f"{name}/{x}"]) for x in "wab")
        scale = jnp.asarray(WANT["scale"])
        kernel = lora_jax.LoraWeight(w, a, b, scale, layout=lora_jax.Layout("io"))
        return {"kernel": kernel, "bias": jnp.asarray(WANT[f"{name}/bias"])}

    return {name: layer(name) for name in LAYERS}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"] + params["down"]["bias"][None]


def loss(params):
    return ((lora_jax.lora(model)(params, WANT["x"]) - WANT["target"]) ** 2).mean()


@pytest.mark.parametrize("run", RUNS)
def test_five_steps(run):
    params = start()
    tx = lora_jax.riemannian(RUNS[run][0], params, damping=RUNS[run][1])

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (lora_jax.apply_updates(params, updates), state), value

    steps = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=5))
    (after, _), losses = steps(params)
    np.testing.assert_allclose([*losses, loss(after)], WANT[f"{run}/loss"], rtol=2e-5)
    for name in LAYERS:
        for field in ("a", "b"):
            got, want = getattr(after[name]["kernel"], field), WANT[f"{run}/{name}/{field}"]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
