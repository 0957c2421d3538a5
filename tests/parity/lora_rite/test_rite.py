"""Six steps of LoRA-RITE in float64 against recorded runs of the PyTorch implementation."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax


@pytest.mark.usefixtures("x64", "quick_compile")
def test_six_steps():
    want = dict(np.load(pathlib.Path(__file__).parent / "rite.npz"))
    a, b = jnp.asarray(want["a"]), jnp.asarray(want["b"])
    layout = lora_jax.Layout("io")
    params = {"k": lora_jax.LoraWeight(None, a, b, jnp.float64(1), layout=layout)}
    tx = lora_jax.lora_rite(0.02, params, b2=0.99)

    def loss(params):
        product = params["k"].a @ params["k"].b
        return (want["weights"] * (jnp.sin(product) - want["target"]) ** 2).sum()

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return lora_jax.apply_updates(params, updates), state

    run = jax.jit(lambda params: jax.lax.fori_loop(0, 6, step, (params, tx.init(params)))[0])
    got = run(params)["k"]
    np.testing.assert_allclose(got.a, want["after_a"], rtol=1e-10)
    np.testing.assert_allclose(got.b, want["after_b"], rtol=1e-10)
