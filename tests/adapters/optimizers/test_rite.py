"""LoRA-RITE takes the same steps of A·B for any factors of the same product; Adam does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.adapters.optimizers.cases import distance, moves, product, train, weight
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")


def refactored(node, seed):
    """The same product from (A·R, R⁻¹·B) for a random R, far from orthogonal."""
    r = normal(seed, (node.rank, node.rank), jnp.float64) + 2 * jnp.eye(node.rank)
    assert 3 < np.linalg.cond(r) < 1000
    return dataclasses.replace(node, a=node.a @ r, b=jnp.linalg.inv(r) @ node.b)


def starts():
    """Factors of one product, three times: as they are, and with two random R."""
    node = weight("io", (7, 6), 3, seed=2, dtype=jnp.float64)
    nodes = [node, refactored(node, 8), refactored(node, 9)]
    return {"k": jax.tree.map(lambda *x: jnp.stack(x), *nodes)}


def products(make, steps=6):
    """A·B after some steps from each start."""
    run = lambda params: product(train(make(params), params, steps)[0]["k"])
    return jax.vmap(run)(starts())


def difference(make):
    """How far the products of the other starts are from the first's change, relatively."""
    ends = np.asarray(products(make))
    change = np.linalg.norm(ends[0] - product(jax.tree.map(lambda x: x[0], starts())["k"]))
    return max(np.linalg.norm(end - ends[0]) / change for end in ends[1:])


@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_the_product_does_not_depend_on_its_factors(momentum):
    assert difference(lambda params: lora_jax.lora_rite(0.05, params, b1=momentum)) < 1e-9


def test_the_products_of_adam_do():
    assert difference(lambda params: lora_jax.freeze(optax.adam(0.05), params)) > 0.1


@pytest.mark.slow
def test_fifty_steps():
    assert difference(lambda params: lora_jax.lora_rite(0.05, params)) < 1e-9
    make = lambda params: lora_jax.lora_rite(0.05, params)
    first = {"k": jax.tree.map(lambda x: x[0], starts()["k"])}
    ends = np.asarray(products(make, 50))
    assert distance(train(make(first), first, 50)[0]) < distance(first) - 1
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-6, atol=1e-6)


def test_a_step_has_the_size_of_adams():
    """At first M is √in · U·Vᵀ of the gradient: its entries have mean square 1, times the rate."""
    node = {"k": weight("io", (64, 6), 3, dtype=jnp.float64)}
    gradients = jax.tree.map(lambda x: normal(5, x.shape, x.dtype), node)
    updates = moves(lora_jax.lora_rite(0.01, node), gradients, node)
    change = np.asarray(updates["k"].a @ node["k"].b)
    np.testing.assert_allclose(
        np.linalg.svd(change)[1][:4], [0.01 * 8] * 3 + [0], rtol=1e-3, atol=1e-9
    )
