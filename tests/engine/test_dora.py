"""DoRA, `magnitude · V / ‖V‖` with `V = W + scale·A·B`, over every program of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.devices import temporary_bytes
from tests.engine.test_programs import TOLERANCE, check_equal
from tests.programs import CASES, a_few, adapt, merged, normal, randomize

# Where a magnitude cannot stay apart from its weight.
DENSE = {
    "summed_axis",
    "concatenated_inputs",
    "concatenated_with_an_array",
    "selected_by_a_flag",
    "padded_weight",
    "lookups_out_of_bounds",
}
DENSE |= {case.name for case in CASES if case.name.startswith("custom_") or "ragged" in case.name}


@pytest.mark.parametrize("case", a_few(CASES), ids=str)
def test_equals_the_merged_model(case, x64, quick_compile):
    fn, params, args = case.build(jnp.float64)
    params = adapt((fn, params, args), case.layouts, jnp.float64, dora=True)
    adapted = lora_jax.lora(fn, on_dense="allow" if case.name in DENSE else "error")
    check_equal(case, fn, adapted, params, args, TOLERANCE["float64"])


def dense(size=64, dtype=jnp.float32, **options):
    """Return fn, params and x of one adapted product and its bias, B random."""

    def fn(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"])

    params = {"kernel": normal(1, (size, size), dtype), "bias": jnp.zeros((1, size), dtype)}
    x = normal(2, (3, size), dtype)
    config = lora_jax.LoraConfig(rank=2, alpha=3, dora=True, **options)
    return fn, lora_jax.init(jax.random.key(0), params, config, fn, x), x


def formula(node):
    """Equation 5 of https://arxiv.org/abs/2402.09353, the dense way, for a kernel [in, out]."""
    v = node.w + node.scale * node.a @ node.b
    return (
        node.magnitude[None] * v / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True))
    )


def test_equals_the_dense_formula_and_its_gradient(quick_compile):
    fn, params, x = dense()
    params = randomize(params)

    def loss(params, model):
        return (model(params, x) ** 2).mean()

    def oracle(params, x):
        return fn(params | {"kernel": formula(params["kernel"])}, x)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (got, grads), (want, wanted) = both(params, lora_jax.lora(fn)), both(params, oracle)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name in ("a", "b", "magnitude"):
        g, w = (np.asarray(getattr(tree["kernel"], name)) for tree in (grads, wanted))
        assert abs(w).max() > 1e-5
        np.testing.assert_allclose(g, w, atol=1e-5 * abs(w).max())
    assert not np.any(grads["kernel"].w)


def test_the_merged_weight_has_the_gradient_of_the_formula(quick_compile):
    """The norm is a constant there as well."""
    node = randomize(dense()[1])["kernel"]

    def grads(fn):
        return jax.jit(jax.grad(lambda node: jnp.sin(fn(node)).sum()))(node)

    got, want = grads(lambda node: lora_jax.merge({"kernel": node})["kernel"]), grads(formula)
    for name in ("a", "b", "magnitude"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("optimized")
def test_starts_at_the_base_and_disabled_is_the_base_to_the_bit():
    fn, params, x = dense()
    base, _ = lora_jax.split(params)
    np.testing.assert_allclose(lora_jax.lora(fn)(params, x), fn(base, x), atol=1e-6)
    off = lora_jax.disable(randomize(params))
    np.testing.assert_array_equal(lora_jax.lora(fn)(off, x), fn(base, x))
    np.testing.assert_array_equal(lora_jax.merge(off)["kernel"], base["kernel"])


def temporaries(loss, *args):
    """Return the temporary bytes of the gradient of `loss` with respect to its first argument."""
    return temporary_bytes(jax.jit(jax.grad(loss)).lower(*args).compile())


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_makes_nothing_weight_sized(dtype):
    """A forward and backward pass has the frozen model's temporaries, and small ones."""
    fn = dense(8)[0]
    params, x = jax.eval_shape(lambda: dense(1024, dtype)[1:])
    base, adapters = lora_jax.split(params)

    def ours(adapters, base, x):
        return lora_jax.lora(fn)(lora_jax.join(base, adapters), x).astype("float32").sum()

    def frozen(x, base):
        return fn(base, x).astype("float32").sum()

    extra = temporaries(ours, adapters, base, x) - temporaries(frozen, x, base)
    assert extra < 0.1 * base["kernel"].size * jnp.dtype(dtype).itemsize


def test_trains_saves_and_merges_per_layer(tmp_path, quick_compile):
    """A stack of layers: the magnitude trains, is saved and merged; the base does not change."""

    def fn(params, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["kernel"])[0]

    base, x = {"kernel": normal(1, (3, 8, 8), jnp.float32)}, normal(2, (4, 8), jnp.float32)
    config = lora_jax.LoraConfig(rank=2, dora=True)
    params = lora_jax.init(jax.random.key(0), base, config, fn, x)
    assert params["kernel"].magnitude.shape == (3, 8)
    tx = lora_jax.freeze(optax.adam(1e-2), params)

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: (lora_jax.lora(fn)(p, x) ** 2).sum())(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    trained = step(params)
    magnitudes = [np.asarray(tree["kernel"].magnitude) for tree in (trained, params)]
    assert (magnitudes[0] != magnitudes[1]).all()
    np.testing.assert_array_equal(trained["kernel"].w, base["kernel"])
    lora_jax.save(tmp_path / "a.safetensors", trained, config=config)
    loaded = lora_jax.join(base, lora_jax.load(tmp_path / "a.safetensors", base))
    plain = lora_jax.merge(loaded)
    np.testing.assert_allclose(plain["kernel"], jax.jit(merged)(trained)["kernel"], atol=1e-6)
    np.testing.assert_allclose(fn(plain, x), lora_jax.lora(fn)(trained, x), atol=1e-5)
    assert lora_jax.count_params(params).trainable == 2 * 3 * 8 * 2 + 3 * 8


def test_unmerge_says_that_the_base_must_be_kept():
    _, params, _ = dense()
    _, adapters = lora_jax.split(params)
    with pytest.raises(lora_jax.MergeError, match=r"weight of kernel: with DoRA .* Keep the base"):
        lora_jax.unmerge(lora_jax.merge(params), adapters)


def test_shapes_are_enough():
    fn, params, x = dense()
    base, _ = lora_jax.split(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    config = lora_jax.LoraConfig(rank=2, dora=True)
    node = lora_jax.init(jax.random.key(0), shapes, config, fn, x)["kernel"]
    assert isinstance(node.magnitude, jax.ShapeDtypeStruct) and node.magnitude.shape == (64,)
