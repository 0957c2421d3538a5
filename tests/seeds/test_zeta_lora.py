"""The page of Zeta's `Lora`: a linear map y = x·W with W = A·B·scale, and no base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import layers
from lora_jax.layers import low_rank
from tests.programs.jaxprs import weight_sized
from tests.seeds.helpers import KEY, close, flops, make, normal

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_zeta_lora_defaults():
    """Lora(dim, dim_out, r=8, alpha=None): "if not provided, it is set to 1"."""
    module = layers.Lora(dim=128, dim_out=64)
    params = make(low_rank, dim=128, dim_out=64)
    assert (module.r, params["a"].shape, params["b"].shape) == (8, (128, 8), (8, 64))
    close(low_rank.weight(params), np.asarray(params["a"]) @ params["b"] / 8)


def test_zeta_lora_starts_with_normal_a_and_b():
    """nn.Parameter(torch.randn(dim, r)), nn.Parameter(torch.randn(r, dim_out))."""
    for x in map(np.asarray, make(low_rank, 600, 500, r=16).values()):
        np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=0.04)
        assert abs(x).max() > 3  # no uniform distribution


@pytest.mark.parametrize("options", [{}, {"r": 16, "alpha": 0.1}], ids=["basic", "rank and scale"])
def test_zeta_lora_forward_and_weight(options):
    """Examples 1 and 2: x (batch_size, dim) to x @ self.weight, (self.A @ self.B) * self.scale."""
    x, module = normal(0, 32, 128), layers.Lora(dim=128, dim_out=64, **options)
    variables = jax.jit(module.init)(KEY, x)
    params = variables["params"]
    r, alpha = options.get("r", 8), options.get("alpha", 1)
    y = module.apply(variables, x)
    weight = module.apply(variables, method="weight")
    assert (y.shape, weight.shape) == ((32, 64), (128, 64))
    close(weight, np.asarray(params["a"]) @ params["b"] * (alpha / r))
    close(y, np.asarray(x) @ np.asarray(weight), 1e-4)
    close(low_rank.apply(params, x, options.get("alpha")), y)


def test_zeta_lora_never_forms_its_weight():
    """ "Computational efficiency": (x·A)·B, no array [dim, dim_out], backward neither."""
    params, x = make(low_rank, 32, 24, r=4), jnp.ones((5, 6, 32))
    loss = lambda params, x: (low_rank.apply(params, x) ** 2).sum()
    for fn in (low_rank.apply, jax.grad(loss, (0, 1))):
        assert not weight_sized(jax.make_jaxpr(fn)(params, x).jaxpr, [(32, 24)])
    dense = lambda params, x: x @ low_rank.weight(params)  # what the search would find
    assert weight_sized(jax.make_jaxpr(dense)(params, x).jaxpr, [(32, 24)])


class Net(nn.Module):
    def setup(self):
        self.lora = layers.Lora(dim=128, dim_out=64)
        self.fc = nn.Dense(10)

    def __call__(self, x):
        return self.fc(self.lora(x))


def test_zeta_lora_in_a_network():
    """Example 3: class Net(nn.Module) with self.lora and self.fc; both learn."""
    model, x = Net(), normal(0, 32, 128)
    variables = jax.jit(model.init)(KEY, x)
    loss = lambda v: (lambda y: ((y**2).mean(), y))(model.apply(v, x))
    grads, y = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert y.shape == (32, 10)
    assert set(grads["params"]["lora"]) == {"a", "b"}
    assert all(abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))


def test_zeta_lora_learns_its_scale():
    """ "A and B, and a scale factor alpha, which are learned during the training process"."""
    x, module = normal(0, 4, 12), layers.Lora(dim=12, dim_out=7, r=3, alpha=0.5, train_alpha=True)
    params = jax.jit(module.init)(KEY, x)["params"]
    grads = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x).sum()))(params)
    assert float(params["alpha"]) == 0.5
    close(grads["alpha"], (np.asarray(x) @ params["a"] @ params["b"]).sum() / 3)


def test_zeta_lora_has_fewer_parameters():
    """ "A significant reduction in the number of parameters to be learned"."""
    sizes = [x.size for x in make(low_rank, dim=128, dim_out=64).values()]
    assert sum(sizes) == 8 * (128 + 64) == 1536 < 128 * 64 / 5


def test_zeta_lora_of_higher_rank_is_more_accurate_and_costs_more():
    """ "A higher value of r will result in a more accurate approximation", at a higher cost."""
    w, x = normal(0, 24, 16), normal(1, 8, 24)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    errors, costs = [], []
    for r in (2, 8, 16):
        params = {"a": jnp.asarray(u[:, :r] * s[None, :r]), "b": jnp.asarray(vt[:r])}
        errors.append(abs(low_rank.apply(params, x, alpha=r) - np.asarray(x) @ w).max())
        costs.append(flops(low_rank.apply, params, x))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    assert costs == sorted(costs) and costs[-1] > 4 * costs[0]
