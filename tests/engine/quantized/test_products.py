"""A quantized base: the program on its dequantized values, without an array of a weight's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.quantized.weight import is_quantized, quantize_array

WIDTH, LAYERS = 128, 3


def unrolled(params, x):
    for layer in params:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def scanned(params, x):
    step = lambda x, layer: (x + jnp.tanh(x @ layer["up"]) @ layer["down"], None)
    return jax.lax.scan(step, x, params)[0]


def layers(stacked):
    shapes = {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}
    keys = jax.random.split(jax.random.key(0), LAYERS)
    found = [{n: jax.random.normal(k, s) / s[0] ** 0.5 for n, s in shapes.items()} for k in keys]
    return jax.tree.map(lambda *w: jnp.stack(w), *found) if stacked else found


def quantize(params, kind):
    return jax.tree.map(lambda w: quantize_array(w, kind, -2), params)


def dequantize(params):
    return jax.tree.map(lambda w: w.dequantize(), params, is_leaf=is_quantized)


def adapters_of(params, fn, x):
    config = lora_jax.LoraConfig(rank=4)
    base, adapters = lora_jax.split(lora_jax.init(jax.random.key(1), params, config, fn, x))
    noise = lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape)
    return base, jax.tree.map(noise, adapters)


DEFAULT = ((unrolled, "int8"), (scanned, "nf4"))
EVERY = [
    pytest.param(fn, kind, marks=[] if (fn, kind) in DEFAULT else pytest.mark.slow)
    for fn in (unrolled, scanned)
    for kind in WRITABLE
    if (KINDS[kind].block or 1) <= WIDTH
]


def loss_of(fn):
    def loss(adapters, base, x):
        return (lora_jax.lora(fn, on_dense="error")(lora_jax.join(base, adapters), x) ** 2).mean()

    return loss


@pytest.mark.parametrize(("fn", "kind"), EVERY)
def test_a_step_equals_that_on_the_dequantized_base(fn, kind):
    x = jax.random.normal(jax.random.key(3), (8, WIDTH))
    quantized = quantize(layers(fn is scanned), kind)
    base, adapters = adapters_of(quantized, fn, x)
    step = jax.jit(jax.value_and_grad(loss_of(fn), (0, 2)))
    got = step(adapters, base, x)
    want = step(adapters, dequantize(base), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_no_array_of_a_weights_size_is_kept():
    x = jax.random.normal(jax.random.key(3), (8, WIDTH))
    quantized = quantize(layers(stacked=False), "nf4")
    base, adapters = adapters_of(quantized, unrolled, x)
    step = jax.jit(jax.value_and_grad(loss_of(unrolled), (0, 2)))
    temporary = [
        step.lower(adapters, b, x).compile().memory_analysis().temp_size_in_bytes
        for b in (base, dequantize(base))
    ]
    one_layer = 4 * 2 * WIDTH * WIDTH
    assert temporary[0] <= temporary[1] + 1.01 * one_layer  # of 2 · 3 layers
    _, pull_back = jax.vjp(lambda x: loss_of(unrolled)(adapters, base, x), x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= 2 * WIDTH * WIDTH]
    assert all(leaf.dtype == jnp.uint8 for leaf in kept)


@pytest.mark.slow
def test_forward_mode_and_mapping():
    x = jax.random.normal(jax.random.key(3), (8, WIDTH))
    base, adapters = adapters_of(quantize(layers(stacked=True), "int8"), scanned, x)
    loss, dense = loss_of(scanned), dequantize(base)
    tangent = lambda base: jax.jvp(lambda x: loss(adapters, base, x), (x,), (x,))[1]
    np.testing.assert_allclose(tangent(base), tangent(dense), rtol=1e-5)
    xs = jnp.stack([x, 2 * x])
    mapped = lambda base: jax.vmap(lambda x: jax.grad(loss, 2)(adapters, base, x))(xs)
    np.testing.assert_allclose(mapped(base), mapped(dense), rtol=1e-5, atol=1e-7)
    copies = jax.tree.map(lambda c: jnp.stack([c, c[::-1]]), base)
    each = jax.vmap(lambda base: jax.grad(loss, 2)(adapters, base, x))(copies)
    np.testing.assert_allclose(each[0], jax.grad(loss, 2)(adapters, dense, x), rtol=1e-5, atol=1e-7)


def test_without_adapters_the_function_takes_quantized_weights():
    x = jax.random.normal(jax.random.key(3), (8, WIDTH))
    quantized = quantize(layers(stacked=False), "int4")
    got = lora_jax.lora(unrolled, on_dense="error")(quantized, x)
    np.testing.assert_allclose(got, unrolled(dequantize(quantized), x), rtol=1e-5, atol=1e-5)


def test_an_input_that_scales_a_weight_gets_its_gradient_and_no_values_are_kept():
    x, s = jax.random.normal(jax.random.key(3), (8, WIDTH)), jnp.float32(0.7)
    w = quantize_array(jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)), "nf4", 0)
    loss = lambda w, s, x: jnp.sin(x @ (w * s)).sum()
    got = jax.grad(lora_jax.lora(loss, on_dense="error"), (1, 2))(w, s, x)
    want = jax.grad(loss, (1, 2))(w.dequantize(), s, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    _, pull_back = jax.vjp(lambda s, x: lora_jax.lora(loss)(w, s, x), s, x)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= WIDTH * WIDTH // 2]
    assert kept and all(leaf.dtype == jnp.uint8 for leaf in kept)


def test_no_gradient_flows_to_the_scales():
    """Also where the program makes an array of the weight."""
    x = jax.random.normal(jax.random.key(3), (8, WIDTH))
    w = quantize_array(jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)), "int8", 0)
    loss = lambda w, x: jnp.sin(x @ jnp.tanh(w)).sum() + jnp.sin(x @ w).sum()
    with pytest.warns(lora_jax.DenseWarning, match="its codes are dequantized"):
        found = jax.grad(lora_jax.lora(loss), allow_int=True)(w, x)
    assert found.fields["codes"].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(found.fields["scales"], np.zeros((1, WIDTH)))
