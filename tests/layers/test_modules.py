"""The low-rank map, the linear layer and the modules: dtypes, refusals, use with lora_jax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, StructureError, layers
from lora_jax.layers import linear, low_rank
from tests.programs import normal, randomize

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


# --- the low-rank map -----------------------------------------------------------------------------


def low_rank_params(dtype=jnp.float32):
    return {"a": normal(0, (6, 2), dtype), "b": normal(1, (2, 5), dtype)}


@pytest.mark.parametrize("x_dtype, dtype", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_low_rank_in_16_bits(x_dtype, dtype):
    """The output has the wider dtype, and sums are added in float32."""
    params, x = low_rank_params(dtype), normal(2, (3, 6), x_dtype)
    y = low_rank.apply(params, x, alpha=3)
    assert y.dtype == jnp.dtype(dtype)
    a, b, x = (np.asarray(v, np.float32) for v in (params["a"], params["b"], x))
    want = 1.5 * (x @ a @ b)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), want, rtol=2 * eps, atol=4 * eps * abs(want).max()
    )


def test_low_rank_has_the_derivatives_of_its_dense_form(x64):
    params, x = low_rank_params("float64"), normal(2, (3, 4, 6), "float64")
    weight = lambda p, alpha: p["a"] @ p["b"] * alpha / 2

    def both(params, x, alpha):
        got = low_rank.apply(params, x, alpha)
        return (jnp.sin(got).sum() - jnp.sin(x @ weight(params, alpha)).sum()), got

    grads, y = jax.jit(jax.grad(both, (0, 1, 2), has_aux=True))(params, x, 0.7)
    assert y.shape == (3, 4, 5)
    for g in jax.tree.leaves(grads):
        np.testing.assert_allclose(g, 0, atol=1e-12)
    np.testing.assert_allclose(low_rank.weight(params, 0.7), weight(params, 0.7), rtol=1e-12)


def test_low_rank_of_one_example_and_of_shapes():
    params, x = low_rank_params(), normal(2, (3, 6), jnp.float32)
    one, many = low_rank.apply(params, x[0]), jax.vmap(lambda x: low_rank.apply(params, x))(x)
    np.testing.assert_allclose(one, many[0], rtol=1e-6)
    shapes = jax.eval_shape(lambda: low_rank.apply(low_rank.init(KEY, 6, 5, 2), jnp.ones((3, 6))))
    assert (shapes.shape, shapes.dtype) == ((3, 5), jnp.float32)


def test_low_rank_refuses():
    for arguments in ((0, 5), (6, 5, 0), (6, 5, 2, float("nan"))):
        with pytest.raises(ConfigError, match=r"sizes|rank|alpha"):
            low_rank.init(KEY, *arguments)
    for x in (jnp.ones((3, 5)), jnp.ones(())):
        with pytest.raises(StructureError, match="must end in the input features"):
            low_rank.apply(low_rank_params(), x)


# --- the linear layer -----------------------------------------------------------------------------


def test_linear_in_16_bits_keeps_its_factors_in_32():
    params = linear.init(KEY, 6, 5, rank=2, dtype=jnp.bfloat16)
    assert {params["kernel"].w.dtype, params["bias"].dtype} == {jnp.dtype(jnp.bfloat16)}
    assert {params["kernel"].a.dtype, params["kernel"].b.dtype} == {jnp.dtype(jnp.float32)}
    assert linear.apply(params, jnp.ones((3, 6), jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear_alpha_none_is_the_rank():
    assert float(linear.init(KEY, 6, 5, rank=2, alpha=None)["kernel"].scale) == 1


def test_linear_refuses():
    for options in ({"rank": 6}, {"rank": -1}, {"rank": 2, "dropout": 1.0}, {"rank": True}):
        with pytest.raises(ConfigError, match=r"rank|dropout"):
            linear.init(KEY, 6, 5, **options)


# --- modules --------------------------------------------------------------------------------------


class Network(nn.Module):
    """All three layers, and a plain one between them."""

    @nn.compact
    def __call__(self, ids):
        x = layers.Embedding(11, 8, rank=2, padding_idx=0, max_norm=1.0)(ids)
        x = nn.LayerNorm()(layers.Lora(8, 6, r=2)(x))
        return layers.LinearWithLoRA(6, 3, rank=2, dropout=0.5)(x)


IDS = jnp.array([[1, 4, 0], [9, 4, 2]])


@functools.cache
def network():
    model = Network()
    return model, randomize(jax.jit(model.init)(KEY, IDS))


def test_a_network_runs_by_itself_transformed_and_merged():
    model, params = network()
    outs = jax.jit(
        lambda p: (
            model.apply(p, IDS),
            lora_jax.lora(model.apply, on_dense="error")(p, IDS),
            model.apply(lora_jax.merge(p), IDS),
        )
    )(params)
    for y in outs[1:]:
        np.testing.assert_allclose(y, outs[0], rtol=1e-5, atol=1e-5)


def test_a_network_is_summed_up_saved_and_loaded(tmp_path):
    _, params = network()
    lines = lora_jax.summary(params).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [
        "params/Embedding_0/embedding",
        "params/LinearWithLoRA_0/kernel",
    ]
    assert "lookup" in lines[1] and "matmul" in lines[2]
    lora_jax.save(tmp_path / "adapter.safetensors", params)
    base, _ = lora_jax.split(params)
    loaded = lora_jax.join(base, lora_jax.load(tmp_path / "adapter.safetensors", base))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_dropout_in_a_network_needs_its_rng():
    model, params = network()
    run = jax.jit(lambda rngs: model.apply(params, IDS, rngs=rngs))
    still, one, other = run({}), *(run({"dropout": jax.random.key(i)}) for i in (1, 2))
    np.testing.assert_array_equal(still, run({"params": KEY}))
    assert not np.allclose(still, one) and not np.allclose(one, other)
    np.testing.assert_array_equal(one, run({"dropout": jax.random.key(1)}))


def test_parameters_of_functions_fit_the_modules():
    params = linear.init(KEY, 6, 5, rank=2, alpha=4)
    module, x = layers.LinearWithLoRA(6, 5, rank=2, alpha=4), normal(0, (3, 6), jnp.float32)
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    np.testing.assert_array_equal(module.apply({"params": params}, x), linear.apply(params, x))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return layers.LinearWithLoRA(6, 6, rank=2, name="linear")(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Body, **options)(name="body")(x, None)[0]


def test_stacked_layers_run_and_are_otherwise_refused():
    model, x = Stack(), jnp.ones((2, 6))
    variables = jax.eval_shape(model.init, KEY, x)
    assert jax.eval_shape(model.apply, variables, x).shape == (2, 6)
    for fn in (lora_jax.merge, lambda v: lora_jax.lora(model.apply)(v, x)):
        with pytest.raises(StructureError, match=r"body/linear/kernel: layout 'io' does not fit"):
            jax.eval_shape(fn, variables)
