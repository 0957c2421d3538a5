"""A depthwise kernel is smaller than its factors: W + A·B is summed up, and that is no warning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.programs import normal, randomize
from tests.programs.convolutions import conv_depthwise
from tests.programs.jaxprs import weight_sized


def adapt(dtype, **options):
    fn, params, args = conv_depthwise(dtype)
    config = lora_jax.LoraConfig(rank=2, **options)
    adapted = lora_jax.init(jax.random.key(0), params, config, fn, *args)
    return fn, randomize(adapted), args


def convolutions(fn, *args):
    text = str(jax.make_jaxpr(fn)(*args))
    return text.count("conv_general_dilated[")


def test_one_convolution_takes_the_place_of_two():
    fn, adapted, args = adapt(jnp.float32)
    run = lora_jax.lora(fn, on_dense="error")
    assert convolutions(run, adapted, *args) == 1
    made = weight_sized(jax.make_jaxpr(run)(adapted, *args).jaxpr, {(3, 3, 8)})
    assert 0 < sum(made.values()) <= 3


def test_a_kernel_with_many_inputs_per_output_keeps_its_factors():
    fn = lambda p, x: jax.lax.conv_general_dilated(
        *(x, p["w"], (1,), "SAME"), feature_group_count=2
    )
    params, x = {"w": normal(1, (64, 32, 3), "float32")}, normal(0, (2, 64, 9), "float32")
    adapted = randomize(lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(2), fn, x))
    traced = jax.make_jaxpr(lora_jax.lora(fn, on_dense="error"))(adapted, x)
    assert not weight_sized(traced.jaxpr, {(64, 32, 3)})


def test_in_16_bits_a_small_update_is_not_lost():
    """The kernel's own part of the output is 1 - 1, and A·B is less than a bit of 1 ± A·B."""
    fn = lambda p, x: jax.lax.conv_general_dilated(
        *(x, p["w"], (1,), "VALID"), feature_group_count=4
    )
    params = {"w": jnp.ones((4, 1, 3), jnp.bfloat16)}
    x = jnp.tile(jnp.array([1, -1, 0], jnp.bfloat16), (1, 4, 1))
    node = randomize(lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(1), fn, x))["w"]
    node = dataclasses.replace(node, b=node.b / 2**12)
    (got,) = lora_jax.lora(fn, on_dense="error")({"w": node}, x)[..., 0]
    assert node.layout.axes == "oii"
    update = node.scale * jnp.einsum("iwr,ro->oiw", node.a, node.b)
    want = update[:, 0, 0] - update[:, 0, 1]
    assert 0 < jnp.abs(want).max() < 2**-9
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=2**-20)


def test_dropout_is_on_the_inputs_of_a():
    fn, adapted, args = adapt(jnp.float32, dropout=0.5)
    run = jax.jit(lora_jax.lora(fn, on_dense="error"))
    whole, base = run(adapted, *args), run(lora_jax.disable(adapted), *args)
    keys = jax.random.split(jax.random.key(1), 400)
    dropped = jax.vmap(lambda key: run(lora_jax.with_dropout(adapted, key), *args))(keys)
    assert not np.allclose(dropped[0], whole)
    spread = float(dropped.std(0).max()) / 20  # of the mean of 400
    np.testing.assert_allclose(dropped.mean(0), whole, atol=5 * spread)
    assert float(jnp.abs(whole - base).max()) > 10 * spread
