"""User-defined rules: toy primitives and a Pallas kernel stay lazy; `init` learns from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import lora_jax
from lora_jax import LoraConfig, Rule
from tests.programs import merged, normal, randomize
from tests.programs.jaxprs import weight_sized

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
X = normal(0, (6, 7), jnp.float32)


# --- a primitive ----------------------------------------------------------------------------------


def primitive(name, fn, **options):
    """Return a primitive that computes `fn`, with JAX's derivative and batching of it."""
    new = Primitive(name)
    new.multiple_results = options.get("multiple_results", False)
    new.def_impl(fn)
    shaped = lambda x: jax.core.ShapedArray(x.shape, x.dtype)
    new.def_abstract_eval(
        lambda *args, **params: jax.tree.map(
            shaped, jax.eval_shape(functools.partial(fn, **params), *args)
        )
    )
    mlir.register_lowering(new, mlir.lower_fun(fn, multiple_results=new.multiple_results))
    ad.primitive_jvps[new] = lambda *args, **params: derivative(fn, *args, **params)
    batching.primitive_batchers[new] = lambda args, dims, **params: (
        jax.vmap(functools.partial(fn, **params), dims)(*args),
        0,
    )
    return new


def derivative(fn, primals, tangents, **params):
    moving = [type(t) is not ad.Zero for t in tangents]

    def of_moving(*moved):
        moved = iter(moved)
        args = [next(moved) if m else x for x, m in zip(primals, moving, strict=True)]
        return fn(*args, **params)

    keep = lambda xs: tuple(x for x, m in zip(xs, moving, strict=True) if m)
    return jax.jvp(of_moving, keep(primals), keep(tangents))


matmul = primitive("toy_matmul", lambda x, w, *, factor: factor * (x @ w))
experts = primitive("toy_experts", lambda w, x: jnp.einsum("eon,ebn->ebo", w, x))
both = primitive("toy_both", lambda x, w: [x @ w, x.sum()], multiple_results=True)


def toy(call, x, w):
    return call(x, w.w) + call.params["factor"] * w.branch(x)


def by_hand(call, x, w):
    return call(x, w.w) + call.params["factor"] * ((x @ w.a) @ w.b)


def adapted(fn, params, rules, x=X, rank=2):
    config = LoraConfig(rank=rank, alpha=3)
    return randomize(lora_jax.init(KEY, params, config, fn, x, rules=rules))


def check(fn, params, rules, x=X, made=0):
    """Value and gradient equal the merged model's, and nothing has the weight's shape."""
    base, adapters = lora_jax.split(params)
    run = lora_jax.lora(fn, on_dense="error", rules=rules)
    ours = lambda a, x: jnp.sin(run(lora_jax.join(base, a), x)).sum()
    oracle = lambda a, x: jnp.sin(fn(merged(lora_jax.join(base, a)), x)).sum()
    got, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(adapters, x)
    want, expected = jax.jit(jax.value_and_grad(oracle, (0, 1)))(adapters, x)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for g, e in zip(grads[0].values(), expected[0].values(), strict=True):
        np.testing.assert_allclose(g.a, e.a, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(g.b, e.b, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(grads[1], expected[1], rtol=1e-3, atol=1e-4)
    shapes = {tuple(sorted(w.w.shape)) for w in params.values()}
    found = weight_sized(jax.make_jaxpr(ours)(adapters, x).jaxpr, shapes)
    assert sum(found.values()) <= made


@pytest.mark.parametrize("apply", [toy, by_hand])
@pytest.mark.parametrize("stored", ["io", "oi"])
def test_a_primitive_with_a_rule_stays_lazy(apply, stored):
    w = normal(1, (7, 5) if stored == "io" else (5, 7), jnp.float32)
    rules = {"toy_matmul": Rule(apply, {1: "io"})}

    def fn(params, x):
        w = params["w"] if stored == "io" else params["w"].T
        return matmul.bind(jnp.tanh(x), w, factor=3.0)

    params = adapted(fn, {"w": w}, rules)
    assert params["w"].layout.axes == stored
    check(fn, params, rules, made=stored == "oi")


def test_a_stored_layout_that_is_the_other_way_round():
    """A tied embedding: its rows are looked up, so A has them; the kernel sums over columns."""
    rules = {"toy_matmul": Rule(toy, {1: "io"})}

    def fn(params, x):
        return (
            matmul.bind(x @ jnp.cos(params["other"]), params["w"].T, factor=2.0) + x @ params["w"]
        )

    params = {"w": normal(1, (7, 7), jnp.float32), "other": normal(2, (7, 7), jnp.float32)}
    config = LoraConfig(rank=2, targets=["w"], overrides={"w": {"layout": "io"}})
    params = randomize(lora_jax.init(KEY, params, config, fn, X, rules=rules))
    got = lora_jax.lora(fn, on_dense="error", rules=rules)(params, X)
    np.testing.assert_allclose(got, fn(merged(params), X), rtol=1e-4, atol=1e-4)


def test_a_rule_inside_a_scan():
    rules = {"toy_matmul": Rule(toy, {1: "io"})}

    def fn(params, x):
        step = lambda h, w: (jnp.tanh(matmul.bind(h, w, factor=1.0)), None)
        return jax.lax.scan(step, x, params["w"])[0]

    params = adapted(fn, {"w": normal(1, (3, 7, 7), jnp.float32)}, rules)
    assert params["w"].layout.axes == "bio"
    check(fn, params, rules)


def test_batch_axes():
    rules = {"toy_experts": Rule(lambda call, w, x: call(w.w, x) + w.branch(x), {0: "boi"})}
    fn = lambda params, x: experts.bind(params["w"], x)
    x = normal(0, (3, 4, 7), jnp.float32)
    params = adapted(fn, {"w": normal(1, (3, 5, 7), jnp.float32)}, rules, x)
    assert params["w"].layout.axes == "boi"
    check(fn, params, rules, x)


def test_several_results():
    def apply(call, x, w):
        y, total = call(x, w.w)
        return [y + w.branch(x), total]

    rules = {"toy_both": Rule(apply, {1: "io"})}
    fn = lambda params, x: both.bind(x, params["w"])[0] * both.bind(x, params["w"])[1]
    check(fn, adapted(fn, {"w": normal(1, (7, 5), jnp.float32)}, rules), rules)


def test_a_rule_takes_the_place_of_the_librarys():
    doubled = Rule(lambda call, x, w: 2 * call(x, w.w), {1: "io"})
    fn = lambda params, x: x @ params["w"]
    params = adapted(fn, {"w": normal(1, (7, 5), jnp.float32)}, {})
    got = lora_jax.lora(fn, rules={"dot_general": doubled})(params, X)
    np.testing.assert_allclose(got, 2 * X @ params["w"].w, rtol=1e-5)


def test_branch_dropout_reaches_a_rule():
    rules = {"toy_matmul": Rule(toy, {1: "io"})}
    fn = lambda params, x: matmul.bind(x, params["w"], factor=1.0)
    config = LoraConfig(rank=2, dropout=0.5)
    params = {"w": normal(1, (7, 5), jnp.float32)}
    params = randomize(lora_jax.init(KEY, params, config, fn, X, rules=rules))
    run = lora_jax.lora(fn, rules=rules)
    dropped = run(lora_jax.with_dropout(params, jax.random.key(1)), X)
    assert not np.allclose(dropped, run(params, X), atol=1e-3)


# --- what no rule covers --------------------------------------------------------------------------


def test_without_a_rule_or_a_layout_the_weight_is_made_dense():
    fn = lambda params, x: matmul.bind(x, params["w"], factor=2.0)
    w = {"w": normal(1, (7, 5), jnp.float32)}
    params = adapted(fn, w, {"toy_matmul": Rule(toy, {1: "io"})})
    refuses = Rule(lambda call, x, w: NotImplemented, {1: "io"})
    for rules in ({}, {"toy_matmul": refuses}, {"toy_matmul": Rule(toy, {0: "io"})}):
        with pytest.warns(lora_jax.DenseWarning, match="toy_matmul"):
            got = lora_jax.lora(fn, rules=rules)(params, X)
        np.testing.assert_allclose(got, fn(merged(params), X), rtol=1e-5, atol=1e-5)


def test_rules_are_checked():
    with pytest.raises(lora_jax.LayoutError, match="'ix'"):
        Rule(toy, {1: "ix"})
    for wrong in ({"toy_matmul": toy}, {matmul: Rule(toy, {1: "io"})}):
        with pytest.raises(lora_jax.ConfigError, match="rules"):
            lora_jax.lora(toy, rules=wrong)
    fn = lambda params, x: matmul.bind(x, params["w"], factor=2.0)
    with pytest.raises(lora_jax.LayoutError, match=r"w: .*'toy_matmul'.*'bio'.*\[7, 5\]"):
        adapted(fn, {"w": normal(1, (7, 5), jnp.float32)}, {"toy_matmul": Rule(toy, {1: "bio"})})


# --- a Pallas kernel, as people write them: inside a custom_vjp -----------------------------------


def kernel(x_ref, w_ref, y_ref):
    y_ref[...] = x_ref[...] @ w_ref[...]


def pallas_matmul(x, w):
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=True, name="matmul")(x, w)


@jax.custom_vjp
def fused(x, w):
    return pallas_matmul(x, w)


fused.defvjp(
    lambda x, w: (fused(x, w), (x, w)),
    lambda saved, g: (pallas_matmul(g, saved[1].T), saved[0].T @ g),
)


def test_a_pallas_kernel():
    def apply(call, x, w):
        return [call(x, w.w)[0] + w.branch(x)]

    rules = {"pallas_call": Rule(apply, {1: "io"})}
    fn = lambda params, x: fused(jnp.tanh(x), params["w"])
    w = normal(1, (7, 5), jnp.float32)
    params = adapted(fn, {"w": w}, rules)
    assert params["w"].layout.axes == "io"
    check(fn, params, rules, made=1)  # the block that the kernel reads
