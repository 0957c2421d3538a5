"""Stricter than users are: leaks, implicit promotion of dtypes and ranks, NaN and infinity."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.engine.test_programs import floats, loss
from tests.programs import CASES, DENSE_CASES, a_few, adapt, merged, normal, randomize

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)

# One program of every kind that JAX traces more than once or keeps state about; not a shard_map,
# for JAX finds a leak in the gradient of any.
LEAKS = ("flax_scan_remat", "nested_jit", "custom_vjp")
MORE_LEAKS = (
    "dense",
    "flax_remat",
    "fori_loop_carries_params",
    "cond_chooses_a_weight",
    "custom_jvp",
    "grad_of_a_scan_remat",
)


def named(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", a_few(CASES + DENSE_CASES), ids=str)
def test_no_implicit_promotion(case):
    """Inference, the forward pass and the gradient, traced where a dtype or rank must not grow."""

    def trace():
        built = case.build(jnp.float32)
        fn, base, args = built
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            fn(base, *args)  # the program itself can be traced so
            params = adapt(built, case.layouts, jnp.float32)
            adapted = lora_jax.lora(fn, on_dense="allow" if case.dense else "error")
            base, adapters = lora_jax.split(params)
            run = lambda a: floats(adapted(lora_jax.join(base, a), *args))
            if not (case.differentiable and case.reverse):
                run(adapters)
                return
            outs, pullback = jax.vjp(run, adapters)
            pullback([jnp.zeros_like(x) for x in outs])

    jax.eval_shape(trace)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["weights", "all"])
def test_no_implicit_promotion_of_mixed_dtypes(dtype, stored):
    """Factors in float32 beside 16-bit weights, or 16-bit too: each cast is written out."""
    factors = jnp.float32 if stored == "weights" else dtype

    def params_of():
        return {"w": normal(1, (7, 5), dtype), "u": normal(2, (3, 5, 9), dtype)}

    def fn(params, x):
        h = jax.lax.scan(lambda h, u: (h, h @ u), x @ params["w"], params["u"])[1]
        return h + (x @ params["w"]).sum().astype(h.dtype)

    def trace():
        config, x = lora_jax.LoraConfig(rank=2, dtype=factors), normal(0, (4, 7), dtype)
        params = randomize(lora_jax.init(KEY, params_of(), config, fn, x))
        run = lora_jax.lora(fn, on_dense="error")
        jax.grad(lambda p: run(p, x).astype(jnp.float32).sum())(params)
        lora_jax.merge(params)
        return run(lora_jax.set_scale(params, 0.5), x), run(lora_jax.disable(params), x)

    with jax.numpy_dtype_promotion("strict"):
        outs = jax.eval_shape(trace)
    assert {out.dtype for out in outs} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "name", [*LEAKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LEAKS)]
)
def test_no_tracer_leaks(name, small_heap):
    case = named(name)
    built = case.build(jnp.float32)
    fn, _, args = built
    params = jax.eval_shape(lambda: adapt(built, case.layouts, jnp.float32))
    run = lora_jax.lora(fn, on_dense="error")

    def ours(adapters, base):
        return loss(run(lora_jax.join(base, adapters), *args))

    base, adapters = lora_jax.split(params)
    with jax.checking_leaks():
        jax.eval_shape(jax.jit(jax.grad(ours)), adapters, base)


# --- degenerate inputs ----------------------------------------------------------------------------


@contextlib.contextmanager
def no_nans():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def block(params, x):
    """A product, a look-up in the other direction, a norm, a soft maximum and an activation."""
    h = x @ params["up"]
    h = jax.nn.gelu(jax.nn.standardize(h, epsilon=1e-6))
    y = h @ params["down"]
    return jax.nn.softmax(y @ params["down"].T) @ params["up"].T, y


def adapted_block(width, hidden, out, rank):
    params = {
        "up": normal(1, (width, hidden), jnp.float32),
        "down": normal(2, (hidden, out), jnp.float32),
    }
    x = jnp.ones((3, width))
    return adapt((block, params, (x,)), {"up": "io", "down": "io"}, jnp.float32, rank=rank)


def check(params, x, fn=block):
    """Values and gradients equal the merged model's, and all are finite."""
    run = lora_jax.lora(fn, on_dense="error")

    @jax.jit
    def compare(params, x):
        plain = merged(params)
        grads = jax.grad(lambda p, x: loss(run(p, x)), (0, 1))(params, x)
        dx = jax.grad(lambda p, x: loss(fn(p, x)), 1)(plain, x)
        return run(params, x), grads, fn(plain, x), dx

    with no_nans():
        got, grads, want, dx = compare(params, x)
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3)
    jax.tree.map(close, got, want)
    close(grads[1], dx)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    return grads[0]


def test_an_empty_batch():
    grads = check(adapted_block(7, 5, 4, 2), jnp.zeros((0, 7)))
    for node in grads.values():
        np.testing.assert_array_equal(node.a, 0)
        np.testing.assert_array_equal(node.b, 0)


def test_activations_of_zero():
    grads = check(adapted_block(7, 5, 4, 2), jnp.zeros((3, 7)))
    assert np.isfinite(grads["up"].a).all()


def test_a_scale_of_zero():
    params = lora_jax.set_scale(adapted_block(7, 5, 4, 2), 0.0)
    grads = check(params, normal(0, (3, 7), jnp.float32))
    for node in grads.values():
        np.testing.assert_array_equal(node.a, 0)


@pytest.mark.parametrize("sizes", [(7, 5, 4), (1, 5, 4), (7, 1, 4), (7, 5, 1), (1, 1, 1)])
def test_the_highest_rank_and_axes_of_size_one(sizes):
    params = adapted_block(*sizes, rank=min(sizes))
    check(params, normal(0, (3, sizes[0]), jnp.float32))


def test_a_batch_of_one_and_none():
    """One row, and a vector that has no batch axis at all."""
    params = adapted_block(7, 5, 4, 2)
    x = normal(0, (1, 7), jnp.float32)
    check(params, x)
    check(params, x[0])


def test_a_stack_of_one_layer_and_an_empty_loop():
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    x = normal(0, (3, 7), jnp.float32)
    params = {"w": normal(1, (1, 7, 7), jnp.float32)}
    check(adapt((fn, params, (x,)), {"w": "bio"}, jnp.float32, rank=7), x, fn)

    def empty(params, x):
        return jax.lax.fori_loop(0, 0, lambda i, h: h @ params["w"][i], x) @ params["w"][0]

    check(adapt((empty, params, (x,)), {"w": "bio"}, jnp.float32), x, empty)
