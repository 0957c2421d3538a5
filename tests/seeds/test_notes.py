"""The notes: LoRA explained with matrices small enough for paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Layout, LoraConfig, LoraWeight
from lora_jax.layers import linear, low_rank
from tests.seeds.helpers import (
    KEY,
    ONE,
    WIDE,
    X,
    adapted_wide,
    close,
    make,
    normal,
    same_bits,
    wide,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

W = jnp.array([[2.0, 4, 6], [3, 6, 9], [4, 8, 12]])


def adapted(w, a, b):
    return LoraWeight(w, jnp.asarray(a), jnp.asarray(b), ONE, layout=Layout("io"))


def test_rank_one_factorisation():
    """[2 3 4]ᵀ·[1 2 3]: 6 values for 9, and "we haven't lost any information"."""
    params = {"a": jnp.array([[2.0], [3], [4]]), "b": jnp.array([[1.0, 2, 3]])}
    np.testing.assert_array_equal(low_rank.weight(params), W)
    np.testing.assert_array_equal(low_rank.apply(params, jnp.eye(3)), W)
    assert (sum(x.size for x in params.values()), W.size) == (6, 9)
    assert np.linalg.matrix_rank(W) == 1


def test_three_by_three_merge_to_the_digit():
    """[4.1 8.62 13.56], [6.3 13.26 20.88], [8.8 18.56 29.28]."""
    a, b = jnp.array([[2.1], [3.3], [4.8]]), jnp.array([[1.0, 2.2, 3.6]])
    update = [["2.10", "4.62", "7.56"], ["3.30", "7.26", "11.88"], ["4.80", "10.56", "17.28"]]
    merged = [["4.10", "8.62", "13.56"], ["6.30", "13.26", "20.88"], ["8.80", "18.56", "29.28"]]
    printed = lambda x: [[f"{v:.2f}" for v in row] for row in np.asarray(x)]
    assert printed(low_rank.weight({"a": a, "b": b})) == update
    assert printed(lora_jax.merge(adapted(W, a, b))) == merged


def test_the_product_of_a_and_b_is_zero_to_begin_with():
    """ "Initially A is Gaussian. Then B is initialized to 0. Then ΔW is scaled by α/r"."""
    params, x = make(linear, 10, 8, rank=2, alpha=6), normal(0, 3, 10)
    base, _ = lora_jax.split(params)
    same_bits(linear.apply(params, x), linear.apply(base, x))
    same_bits(lora_jax.merge(params), base)
    assert float(params["kernel"].scale) == 6 / 2


def test_a_is_gaussian():
    """ "Initially A is initialized randomly using a Gaussian/normal distribution", B to 0."""
    shape = {"w": jnp.ones((500, 60))}
    node = lora_jax.init(KEY, shape, LoraConfig(rank=50, init="gaussian"))["w"]
    a = np.asarray(node.a)
    np.testing.assert_allclose([a.mean() / a.std(), (a**4).mean() / a.var() ** 2], [0, 3], atol=0.1)
    assert not node.b.any()


def test_the_forward_pass_is_the_base_and_the_update():
    """h = W₀x + ΔWx = W₀x + BAx."""
    b, a, x = normal(0, 3, 1), normal(1, 1, 3), normal(2, 3)
    h = lora_jax.lora(lambda w, x: x @ w, on_dense="error")(adapted(W.T, a.T, b.T), x)
    w, a, b, x = map(np.asarray, (W, a, b, x))
    close(h, w @ x + b @ (a @ x))


def test_only_the_new_weights_are_updated():
    """ "We don't update the pre-trained weights, we only update the weights in the new layers"."""
    params = adapted_wide()
    tx = lora_jax.freeze(optax.adamw(0.1, weight_decay=0.1), params)

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: lora_jax.lora(wide)(p, X).sum())(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    after = step(params)
    same_bits(lora_jax.split(after)[0], WIDE)
    assert all((np.asarray(after[p].a) != params[p].a).any() for p in WIDE)


def test_merging_does_not_increase_the_size_of_the_model():
    """ "The LoRA matrices can be merged, which does not increase the size of the model"."""
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(jax.eval_shape(lora_jax.merge, adapted_wide())) == shapes(WIDE)


def test_one_base_many_adapters():
    """ "A single base model and multiple adaptation matrices": swapped without recompiling."""
    base, first = lora_jax.split(adapted_wide())
    assert all(base[path] is WIDE[path] for path in WIDE)
    traces = []

    @jax.jit
    def run(base, adapters):
        traces.append(1)
        return lora_jax.lora(wide)(lora_jax.join(base, adapters), X)

    plain = jax.jit(wide)
    second = jax.tree.map(lambda x: -x, first)
    for adapters in (first, second, lora_jax.disable(first)):
        want = plain(lora_jax.merge(lora_jax.join(base, adapters)), X)
        close(run(base, adapters), want, 1e-4)
    assert len(traces) == 1


def test_parameter_line():
    """trainable params: 2457600 || all params: 3005015040 || trainable%: 0.08178328451893539."""
    width, blocks = 2560, 30
    whole = 250_880 * width + 4 * width + blocks * (12 * width**2 + 13 * width)  # bloomz-3b
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {f"h_{i}": shape(width, 3 * width) for i in range(blocks)}
    params = lora_jax.init(KEY, params, LoraConfig(rank=8))
    params |= {"everything else": shape(whole - blocks * 3 * width**2)}
    assert str(lora_jax.count_params(params)) == (
        "trainable params: 2457600 || all params: 3005015040 || trainable%: 0.08178328451893539"
    )


def test_inference_needs_the_base_and_the_adapter():
    """ "The same memory requirements for inference plus those of the adaptation matrices"."""
    _, adapters = lora_jax.split(adapted_wide())

    def arguments(fn, params):
        return jax.jit(fn).lower(params, X).compile().memory_analysis().argument_size_in_bytes

    more = arguments(lora_jax.lora(wide), adapted_wide()) - arguments(wide, WIDE)
    assert more == sum(x.nbytes for x in jax.tree.leaves(adapters))


def test_svd_truncation():
    """A = UΣVᵀ, cut at rank r: the best there is, off by the singular values left out."""
    tuned = np.asarray(W + normal(0, 3, 3))
    u, s, vt = np.linalg.svd(tuned - W)
    for r in (1, 2, 3):
        merged = lora_jax.merge(adapted(W, u[:, :r] * s[None, :r], vt[:r]))
        close(np.linalg.norm(merged - tuned), np.linalg.norm(s[r:]))
        overlay, _ = lora_jax.extract({"w": W}, {"w": jnp.asarray(tuned)}, r, exact=True)
        close(lora_jax.merge(lora_jax.join({"w": W}, overlay))["w"], merged, 1e-4)


def test_adam_optimizes_the_adapter():
    """ "LoRA uses Adam for model optimization": it finds a change of rank one."""
    target = W + normal(0, 3, 1) @ normal(1, 1, 3)
    fn = lambda p: p["w"].T @ jnp.eye(3)
    params = lora_jax.init(KEY, {"w": W}, LoraConfig(rank=1), fn)
    tx = lora_jax.freeze(optax.adam(3e-2), params)

    def step(carry, _):
        params, state = carry
        loss = lambda p: ((lora_jax.lora(fn)(p) - target.T) ** 2).sum()
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    after = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=500)[0][0])(params)
    close(lora_jax.merge(after)["w"], target, 1e-3)


def test_other_methods_can_be_used_in_addition():
    """ "LoRA does not exclude other methods": here leaves that are trained whole beside it."""
    fn = lambda p, x: x @ p["kernel"] + p["bias"][None]
    config = LoraConfig(rank=1, train=["bias"])
    params = lora_jax.init(KEY, {"kernel": W, "bias": jnp.zeros(3)}, config, fn, jnp.ones((2, 3)))
    grads = jax.jit(jax.grad(lambda p: lora_jax.lora(fn)(p, jnp.ones((2, 3))).sum()))(params)
    np.testing.assert_array_equal(grads["bias"].value, 2)
    assert lora_jax.count_params(params).trainable == 6 + 3
