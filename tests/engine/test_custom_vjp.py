"""`custom_vjp` around weights: what is never materialized, what must be, and the warning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.programs import merged, normal, randomize
from tests.programs.jaxprs import weight_sized

X, W = normal(0, (3, 7), jnp.float32), normal(1, (7, 5), jnp.float32)


def product(cotangent):
    """`x @ w` with a user-defined dW."""

    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (cotangent(*saved, g), g @ saved[0].T))
    return lambda params, x: jnp.sin(f(params["w"], x)).sum()


def gradients(fn):
    params = randomize(
        lora_jax.init(jax.random.key(0), {"w": W}, lora_jax.LoraConfig(rank=2), fn, X)
    )
    base, adapters = lora_jax.split(params)
    ours = lambda a: lora_jax.lora(fn, on_dense="error")(lora_jax.join(base, a), X)
    warns = lambda a: lora_jax.lora(fn)(lora_jax.join(base, a), X)
    oracle = lambda a: fn(merged(lora_jax.join(base, a)), X)
    return ours, warns, oracle, adapters


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda w, x, g: (g.clip(-0.5, 0.5).T @ x).T,  # not linear in g
        lambda w, x, g: -2 * jnp.einsum("tk,tn->kn", x, g),
        lambda w, x, g: (x.T.astype(jnp.bfloat16) @ g.astype(jnp.bfloat16)).astype(jnp.float32),
    ],
    ids=["clipped", "scaled", "rounded"],
)
def test_a_product_is_never_made(cotangent):
    ours, _, oracle, adapters = gradients(product(cotangent))
    got, want = jax.grad(ours)(adapters)["w"], jax.grad(oracle)(adapters)["w"]
    # One rounding to bfloat16 is 2^-9; the oracle rounds dW, the library what it is multiplied by.
    rounded = "bfloat16" in str(jax.make_jaxpr(jax.grad(oracle))(adapters))
    tolerance = 2**-6 if rounded else 1e-5
    for g, w in ((got.a, want.a), (got.b, want.b)):
        np.testing.assert_allclose(g, w, atol=tolerance * max(1, np.abs(w).max()))
    made = weight_sized(jax.make_jaxpr(jax.grad(ours))(adapters).jaxpr, {(5, 7)})
    assert sum(made.values()) <= 1  # the transpose of W, for dx


def test_what_is_no_product_is_made_and_said():
    """A rule that adds a constant to dW: correct, dense, and with a warning."""
    ours, warns, oracle, adapters = gradients(product(lambda w, x, g: x.T @ g + 0.1))
    np.testing.assert_allclose(ours(adapters), oracle(adapters), rtol=1e-5)
    with pytest.raises(lora_jax.DenseError, match=r"w: `custom_vjp_call`.*dW"):
        jax.grad(ours)(adapters)
    with pytest.warns(lora_jax.DenseWarning, match=r"w: `custom_vjp_call`.*dW"):
        got = jax.grad(warns)(adapters)["w"]
    want = jax.grad(oracle)(adapters)["w"]
    np.testing.assert_allclose(got.a, want.a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, want.b, rtol=1e-4, atol=1e-4)


def test_no_tracer_leaks(small_heap):
    ours, _, _, adapters = gradients(product(lambda w, x, g: x.T @ g))
    with jax.checking_leaks():
        jax.jit(jax.grad(ours))(adapters)


def test_the_base_of_a_weight_that_an_input_scales_has_a_gradient():
    """Found by the fuzzer: the input's gradient that comes through such a base was lost."""

    @jax.custom_vjp
    def f(w, x):
        return jnp.tanh(x @ w)

    def bwd(saved, g):
        w, x = saved
        g = 5 * g * (1 - jnp.tanh(x @ w) ** 2)  # five times the true one: told apart
        return x.T @ g, g @ w.T

    f.defvjp(lambda w, x: (f(w, x), (w, x)), bwd)

    def model(params, x):
        return f(params["w"] * jnp.sin(x[0, 0]), x)

    params, x = {"w": normal(1, (7, 5), jnp.float32)}, normal(0, (3, 7), jnp.float32)
    config = lora_jax.LoraConfig(rank=2)
    adapted = randomize(lora_jax.init(jax.random.key(0), params, config, model, x))
    run = lora_jax.lora(model, on_dense="allow")
    got = jax.grad(lambda x: jnp.sin(run(adapted, x)).sum())(x)
    want = jax.grad(lambda x: jnp.sin(model(merged(adapted), x)).sum())(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(lora_jax.DenseError, match="all of dW"):
        jax.grad(lambda x: lora_jax.lora(model, on_dense="error")(adapted, x).sum())(x)
