"""LoRA-Muon moves each weight by its learning rate in spectral norm, however it is factored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.adapters.optimizers.cases import distance, moves, noise, product, train, weight
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")


def norm(x):
    return float(jnp.linalg.norm(x, 2))


def slopes_of(params, gradient):
    """The gradients of A and B for a gradient of each weight."""
    node, scale = params["k"], params["k"].scale[..., None, None]
    a, b = (jnp.swapaxes(x, -1, -2) for x in (node.a, node.b))
    return {"k": dataclasses.replace(node, a=scale * gradient @ b, b=scale * a @ gradient)}


@pytest.mark.parametrize("rank", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_each_factor_moves_the_weight_by_half_the_rate(rank):
    """Whatever the rank, also more than the weight has outputs, scale, size or balance."""
    cases = [(1.0, 1.0, 1.0), (0.25, 100.0, 1.0), (16.0, 1e-3, 1e3), (2.0, 1e-4, 1e-4)]
    nodes = [weight("io", (12, 9), rank, seed=i, scale=case[0]) for i, case in enumerate(cases)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *nodes)
    sizes = lambda i: jnp.array([case[i] for case in cases])[:, None, None]
    params = {"k": dataclasses.replace(stack, a=stack.a * sizes(1), b=stack.b * sizes(2))}
    tx, node = lora_jax.lora_muon(0.1, params), params["k"]
    step = jax.jit(lambda slopes: tx.update(slopes, tx.init(params), params)[0]["k"])
    for size in (1.0, 1e-15):
        found = step(slopes_of(params, size * normal(3, (4, 12, 9), jnp.float32)))
        for i, (scale, *_) in enumerate(cases):
            of_a = scale * found.a[i] @ node.b[i]
            of_b = scale * node.a[i] @ found.b[i]
            np.testing.assert_allclose([norm(of_a), norm(of_b)], 0.05, rtol=1e-4)
            assert 0.05 <= norm(of_a + of_b) <= 0.1 + 1e-5


def test_all_singular_values_are_the_same():
    """Steepest descent in spectral norm: -η/2·U·Vᵀ of the gradient times an orthonormal basis."""
    node = weight("io", (12, 9), 3, scale=2.0)
    gradient = np.asarray(normal(5, (12, 9), jnp.float32))  # of the weight
    params = {"k": node}
    tx = lora_jax.lora_muon(0.1, params)
    found = moves(tx, slopes_of(params, gradient), params)["k"]
    rows = np.linalg.qr(np.asarray(node.b).T)[0].T  # the row space of B
    u, _, vt = np.linalg.svd(gradient @ rows.T, full_matrices=False)
    np.testing.assert_allclose(2 * found.a @ node.b, -0.05 * u @ vt @ rows, atol=1e-5)
    columns = np.linalg.qr(np.asarray(node.a))[0]
    u, _, vt = np.linalg.svd(columns.T @ gradient, full_matrices=False)
    np.testing.assert_allclose(2 * node.a @ found.b, -0.05 * columns @ u @ vt, atol=1e-5)


def test_decay_is_of_the_product():
    """Of zero gradients: A·B shrinks by 1 - η·λ; with them, the step keeps its size."""
    params = {"k": weight("io", (6, 5), 2)}
    tx = lora_jax.lora_muon(0.1, params, weight_decay=2.0)
    still = jax.tree.map(jnp.zeros_like, params)
    after = lora_jax.apply_updates(params, moves(tx, still, params))
    np.testing.assert_allclose(product(after["k"]), 0.8 * product(params["k"]), rtol=1e-5)
    found = moves(tx, noise(3, params), params)["k"]
    shrink = 1 - np.sqrt(0.8)
    step = 1.5 * (found.a + shrink * params["k"].a) @ params["k"].b
    np.testing.assert_allclose(norm(step) * np.sqrt(0.8), 0.05, rtol=1e-4)


@pytest.mark.slow
def test_sizes_and_rotations_of_factors_do_not_matter():
    """The product of (c·A·Q, Qᵀ·B/c) takes the same steps for any number and orthogonal Q."""
    node = weight("io", (6, 5), 2)
    q = jnp.linalg.qr(normal(7, (2, 2), jnp.float32))[0]
    other = dataclasses.replace(node, a=30 * node.a @ q, b=q.T @ node.b / 30)
    both = jax.tree.map(lambda *x: jnp.stack(x), node, other)
    run = lambda node: train(lora_jax.lora_muon(0.1, {"k": node}), {"k": node}, 5)[0]["k"]
    first, second = (jax.tree.map(lambda x, i=i: x[i], jax.vmap(run)(both)) for i in range(2))
    np.testing.assert_allclose(product(second), product(first), rtol=1e-3, atol=1e-4)
    assert distance({"k": first}) < distance({"k": node}) - 0.5


def test_a_schedule_and_a_disabled_adapter():
    params = {"k": weight("io", (6, 5), 2, b_zero=True)}
    tx = lora_jax.lora_muon(lambda step: 0.1 / (1 + step), params)
    slopes, state, update = noise(3, params), tx.init(params), jax.jit(tx.update)
    for want in (0.05, 0.025):
        updates, state = update(slopes, state, params)
        np.testing.assert_allclose(norm(1.5 * params["k"].a @ updates["k"].b), want, rtol=1e-4)
        np.testing.assert_array_equal(updates["k"].a, 0)  # B is zero
    off = lora_jax.disable(params)
    updates, _ = update(slopes, tx.init(off), off)
    np.testing.assert_array_equal(updates["k"].b, 0)
