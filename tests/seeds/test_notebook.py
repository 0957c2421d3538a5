"""The notebook: a LoRA layer made by hand, which here is a function of two arrays, adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig
from tests.seeds.helpers import KEY, close, factors, normal, same_bits, with_b

pytestmark = pytest.mark.usefixtures("quick_compile")


def layer(bias=True, alpha=None):
    """Linear(in_features=10, out_features=10, bias, r=4, alpha): adapted, plain, its function."""

    def fn(params, x):
        y = x @ params["weight"]
        return y + jnp.broadcast_to(params["bias"], y.shape) if bias else y

    plain = {"weight": normal(0, 10, 10)} | ({"bias": jnp.ones(10)} if bias else {})
    config = LoraConfig(rank=4, alpha=alpha)
    return lora_jax.init(KEY, plain, config, fn, jnp.ones((8, 10))), plain, fn


@pytest.mark.parametrize("bias", [True, False])
def test_notebook_layer_keeps_the_shape_and_starts_as_the_base(bias):
    """x = torch.ones((8, 10)); y = layer(x); assert x.shape == y.shape; "∆W = BA is zero"."""
    params, plain, fn = layer(bias)
    x = jnp.ones((8, 10))
    y = lora_jax.lora(fn, on_dense="error")(params, x)
    assert y.shape == x.shape
    same_bits(y, fn(plain, x))


def test_notebook_layer_alpha_none_is_the_rank():
    """if alpha is None: alpha = r, so that the scaling factor alpha/r = 1."""
    assert float(layer()[0]["weight"].scale) == 1
    assert float(layer(alpha=2)[0]["weight"].scale) == 0.5


def test_notebook_layer_starts_kaiming_uniform_and_zero():
    """nn.init.kaiming_uniform_(self.lora_a, a=5 ** 0.5), nn.init.zeros_(self.lora_b)."""
    params = lora_jax.init(KEY, {"w": jnp.ones((400, 50))}, LoraConfig(rank=40))
    _, a, b, _ = factors(params["w"])
    bound = np.sqrt(6 / ((1 + 5) * 400))  # √(6/((1 + a²)·fan_in)) with a = √5
    assert 0.99 * bound < abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.02)  # uniform
    np.testing.assert_allclose(a.mean(), 0, atol=0.02 * bound)
    assert not b.any()


def test_notebook_layer_forward():
    """output += (x @ self.lora_a.T @ self.lora_b.T) * self.scaling."""
    params, plain, fn = layer(alpha=12)
    params, x = with_b(params), normal(3, 8, 10)
    w, a, b, _ = factors(params["weight"])
    lora_a, lora_b = a.T, b.T  # as PyTorch holds them
    want = x @ w + plain["bias"][None] + (x @ lora_a.T @ lora_b.T) * 3
    close(lora_jax.lora(fn)(params, x), want)


def test_notebook_layer_trains_a_and_b_alone():
    """ "Only lora_a and lora_b must be trainable"."""
    leaves = jax.tree_util.tree_leaves_with_path(lora_jax.mask(layer()[0]))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, on in leaves if on]
    assert names == ["weight.a", "weight.b"]


def test_optimizer_state_is_of_the_adapter_alone():
    """ "We do not need to maintain the optimizer states for most parameters"."""
    params, _, _ = layer()
    state = lora_jax.freeze(optax.adam(1e-3), params).init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * (4 * 10 + 10 * 4) + 1
