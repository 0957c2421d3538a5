"""What a rematerialized program saves: the sum of an adapted product; nothing is recomputed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.engine import remat
from tests.programs import merged, normal, randomize

pytestmark = pytest.mark.usefixtures("optimized")

DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
LAYERS, WIDTH, ROWS, RANK = 3, 32, 64, 2


def by_hand(x, p):
    """Two products, as the rule for `dot_general` writes them, with something between them."""
    for w, a, b in (p["up"], p["down"]):
        x = jnp.sin(remat.mark_sum(x @ w + (x @ a) @ b))
    return x


def factors():
    shapes = (WIDTH, WIDTH), (WIDTH, RANK), (RANK, WIDTH)
    return {
        name: tuple(normal(i, (LAYERS, *s), jnp.float32) / 8 for i, s in enumerate(shapes, start))
        for start, name in ((1, "up"), (5, "down"))
    }


def loss(block, policy, pairs, weights, x):
    """The layers in a scan, each one rematerialized; gradients for A and B alone."""
    body = jax.checkpoint(block, policy=policy, prevent_cse=False)
    layers = {name: (w, *pairs[name]) for name, w in weights.items()}
    return jax.lax.scan(lambda x, p: (body(x, p), None), x, layers)[0].sum()


def gradient(policy, block=by_hand):
    params, x = factors(), normal(9, (ROWS, WIDTH), jnp.float32)
    pairs = {name: p[1:] for name, p in params.items()}
    weights = {name: p[0] for name, p in params.items()}
    args = pairs, weights, x
    fn = jax.jit(jax.grad(lambda *args: loss(block, policy, *args)))
    return fn(*args), fn.lower(*args).compile()


def test_of_an_adapted_product_the_sum_alone_is_kept():
    want, dots = gradient(DOTS)
    got, sums = gradient(lora_jax.save_sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    kept = dots.memory_analysis().temp_size_in_bytes - sums.memory_analysis().temp_size_in_bytes
    assert kept >= 2 * LAYERS * ROWS * WIDTH * 4  # one array the less for each product
    assert sums.cost_analysis()["flops"] <= dots.cost_analysis()["flops"]
    _, nothing = gradient(None)
    assert sums.cost_analysis()["flops"] < 0.9 * nothing.cost_analysis()["flops"]


def test_products_that_are_not_adapted_are_kept_too():
    def plain(x, p):
        for w, a, b in (p["up"], p["down"]):
            x = jnp.sin(x @ w) + 0 * (a.sum() + b.sum())
        return x

    _, dots = gradient(DOTS, plain)
    _, sums = gradient(lora_jax.save_sums, plain)
    assert sums.cost_analysis()["flops"] == dots.cost_analysis()["flops"]
    assert sums.memory_analysis().temp_size_in_bytes == dots.memory_analysis().temp_size_in_bytes


def test_a_policy_with_the_sums():
    _, mine = gradient(remat.with_sums(DOTS))
    _, same = gradient(lora_jax.save_sums)
    assert mine.memory_analysis().temp_size_in_bytes == same.memory_analysis().temp_size_in_bytes


def plain_loss(policy):
    def block(x, p):
        for name in ("up", "down"):
            x = jnp.sin(x @ p[name])
        return x

    def fn(params, x):
        body = jax.checkpoint(block, policy=policy, prevent_cse=False)
        return jax.lax.scan(lambda x, p: (body(x, p), None), x, params)[0].sum()

    return fn


def compiled(policy):
    """Return the gradient of a transformed model that contains this policy."""
    weights, x = {n: p[0] for n, p in factors().items()}, normal(9, (ROWS, WIDTH), jnp.float32)
    config = lora_jax.LoraConfig(rank=RANK)
    params = lora_jax.init(jax.random.key(0), weights, config, plain_loss(None), x)
    base, adapters = lora_jax.split(randomize(params))
    fn = lora_jax.lora(plain_loss(policy))
    step = jax.jit(jax.grad(lambda a, base, x: fn(lora_jax.join(base, a), x)))
    return step.lower(adapters, base, x).compile()


def test_a_model_that_keeps_its_products_keeps_the_sums_in_their_place():
    """The model's own policy, so the model need not change."""
    _, by_hand_with_dots = gradient(DOTS)
    kept = compiled(DOTS).memory_analysis().temp_size_in_bytes
    assert kept == compiled(lora_jax.save_sums).memory_analysis().temp_size_in_bytes
    before = by_hand_with_dots.memory_analysis().temp_size_in_bytes
    assert before - kept >= LAYERS * ROWS * WIDTH * 4


def test_a_model_that_keeps_nothing_keeps_no_sums():
    nothing, kept = compiled(jax.checkpoint_policies.nothing_saveable), compiled(DOTS)
    assert nothing.cost_analysis()["flops"] > kept.cost_analysis()["flops"]
    saved = kept.memory_analysis().temp_size_in_bytes
    assert saved - nothing.memory_analysis().temp_size_in_bytes >= LAYERS * ROWS * WIDTH * 4


@pytest.mark.parametrize("policy", [None, DOTS, lora_jax.save_sums])
def test_a_product_with_a_checkpoint_inside_can_be_transposed(policy):
    """As `jax.linear_transpose` and iterative solvers do with `lora(fn)` and fixed adapters."""
    params = {"w": normal(1, (5, 5), jnp.float32)}
    product = jax.checkpoint(lambda params, x: params["w"] @ x, policy=policy)
    x = normal(2, (5,), jnp.float32)
    config = lora_jax.LoraConfig(rank=2)
    params = randomize(lora_jax.init(jax.random.key(0), params, config, product, x))
    apply = lora_jax.lora(product, on_dense="error")
    (got,) = jax.linear_transpose(lambda x: apply(params, x), x)(x)
    np.testing.assert_allclose(got, merged(params)["w"].T @ x, rtol=1e-5, atol=1e-5)
