"""The forms of the branch are equal, and each does what it is for."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.engine.forms import PLAIN, Forms
from tests.programs import CASES, normal, randomize
from tests.programs.forms import FORMS
from tests.programs.jaxprs import equations
from tests.programs.table import adapt, merged

NAMES = ("attention", "matmul_transposed", "flax_scan")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=str)
def test_every_row_of_forms_is_the_merged_model(case, x64, quick_compile):
    built = case.build(jnp.float64)
    fn, _, args = built
    params = adapt(built, case.layouts, jnp.float64)

    @jax.jit
    def run(params):
        return [lora_jax.lora(fn, forms=forms)(params, *args) for forms in FORMS]

    want = fn(merged(params), *args)
    for got in run(params):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), got, want)


def qkv(names=("q", "k", "v"), rank=2, **fields):
    """Return a model in which 7 × 5 weights meet one activation, and its adapted parameters."""
    params = {name: normal(i, (7, 5), jnp.float32) for i, name in enumerate(names)}
    x = normal(9, (2, 3, 7), jnp.float32)

    def model(params, x):
        h = jnp.tanh(x)
        return [h @ params[name] for name in params]

    config = lora_jax.LoraConfig(rank=rank, **fields)
    return model, randomize(lora_jax.init(jax.random.key(0), params, config, model, x)), x


def dots(fn, *args):
    """Return the shapes of the operands of every product in a program."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return [
        tuple(v.aval.shape for v in eqn.invars)
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize("forms", [Forms(), Forms(flatten=False), Forms(rank_first=False)])
def test_weights_that_meet_one_activation_share_one_product(forms):
    model, params, x = qkv()
    shared = dots(lora_jax.lora(model, forms=forms), params, x)
    alone = dots(lora_jax.lora(model, forms=dataclasses.replace(forms, share=False)), params, x)
    assert len(alone) == 9 and len(shared) == 7
    assert sum(6 in {*left, *right} for left, right in shared) >= 1  # the three ranks of 2


def test_ranks_need_not_be_equal_to_share():
    model, params, x = qkv(overrides={"k": {"rank": 3}})
    program = lora_jax.lora(model, forms=Forms())
    assert len(dots(program, params, x)) == 7
    got, want = program(params, x), model(merged(params), x)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_weights_are_shared_through_their_casts():
    """bfloat16 compute casts each kernel at its own place, after the first product."""
    _, params, x = qkv()

    def cast(params, x):
        x = x.astype(jnp.bfloat16)
        return [x @ params[name].astype(jnp.bfloat16) for name in params]

    program = lora_jax.lora(cast, forms=Forms())
    assert len(dots(program, params, x)) == 7
    got, want = program(params, x), cast(merged(params), x)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.05, atol=0.1), got, want)


def test_what_cannot_be_shared_is_not():
    """Another activation, another axis of it, or a mask per weight."""
    model, params, x = qkv(("q", "k"), dropout=0.5)
    program = lora_jax.lora(model, forms=Forms())
    assert len(dots(program, params, x)) == 5
    assert len(dots(program, lora_jax.with_dropout(params, jax.random.key(0)), x)) == 6

    def apart(params, x):
        return x @ params["q"], jnp.sin(x) @ params["k"]

    assert len(dots(lora_jax.lora(apart, forms=Forms()), params, x)) == 6

    def across(params, x):
        x = x[0]  # [3, 7]
        return x @ params["q"], params["k"] @ x[:, :5].T, jnp.swapaxes(x, 0, 1)[:, :1] * 0

    assert len(dots(lora_jax.lora(across, forms=Forms()), params, x)) == 6


def test_a_shared_product_may_come_before_an_unused_one():
    """A view that moves before a group is evaluated once, and freed after its last use."""

    def model(params, x):
        q = x @ params["q"]
        half = params["k"][:, ::-1] * 0.5
        return q * (x @ half), half.sum()

    _, params, x = qkv(("q", "k"))
    program = lora_jax.lora(model, forms=Forms(), on_dense="allow")
    names = Counter(e.primitive.name for e in equations(jax.make_jaxpr(program)(params, x).jaxpr))
    plain = lora_jax.lora(model, forms=PLAIN, on_dense="allow")
    before = Counter(e.primitive.name for e in equations(jax.make_jaxpr(plain)(params, x).jaxpr))
    assert names["rev"] == before["rev"] and names["dot_general"] == before["dot_general"] - 1
    got, want = program(params, x), model(merged(params), x)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)


def test_flattened_products_have_one_token_axis():
    model, params, x = qkv(("q",))
    (base, *branch) = dots(lora_jax.lora(model, forms=Forms()), params, x)
    assert base == ((2, 3, 7), (7, 5))
    assert branch == [((6, 7), (2, 7)), ((6, 2), (2, 5))]
    assert dots(lora_jax.lora(model, forms=PLAIN), params, x)[1:] == [
        ((2, 3, 7), (7, 2)),
        ((2, 3, 2), (2, 5)),
    ]


@pytest.mark.usefixtures("optimized")
@pytest.mark.cpu("it reads the text of a CPU's program")
def test_the_gradient_of_a_is_taken_rank_first():
    """hᵀ·x, and no product whose result is [in, rank]."""
    model, params, x = qkv(("q",))
    base, adapters = lora_jax.split(params)

    def loss(adapters, forms):
        program = lora_jax.lora(model, forms=forms)
        return sum((y**2).sum() for y in program(lora_jax.join(base, adapters), x))

    def results(forms):
        compiled = jax.jit(jax.grad(lambda a: loss(a, forms))).lower(adapters).compile()
        found = re.findall(r" f32\[(\d+),(\d+)\]\{(\d),\d\} dot\(", compiled.as_text())
        # by rows as they lie in memory: the layout {0,1} is that of the transpose
        return {(m, n) if layout == "1" else (n, m) for m, n, layout in found}

    # Without its barrier XLA would turn hᵀ·x into xᵀ·h again.
    assert ("2", "7") in results(Forms()) and ("7", "2") not in results(Forms())
    assert ("7", "2") in results(PLAIN)


def test_backends_get_what_is_fast_there():
    assert Forms.for_backend("cpu") == Forms()
    assert Forms.for_backend("tpu") == Forms(flatten=False, rank_first=False, tie="barrier")
    gpu = dataclasses.replace(PLAIN, narrow=True, apart=True, tie="barrier")
    assert [Forms.for_backend(name) for name in ("gpu", "cuda", "rocm")] == [gpu] * 3
    assert Forms.for_backend() == Forms.for_backend(jax.default_backend())


def test_the_backend_is_that_of_the_arrays(monkeypatch):
    """Under `jit` an array's type names its mesh, and that its platform."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    placed = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("data")))
    own, other = jax.default_backend(), "tpu"
    monkeypatch.setattr(jax, "default_backend", lambda: other)
    seen = []
    jax.jit(lambda *x: seen.append(Forms.for_arrays((x, "relu", 3))))(jnp.ones(4), placed)
    jax.jit(lambda *x: seen.append(Forms.for_arrays(x)))(jnp.ones(4))
    assert seen == [Forms.for_backend(own), Forms.for_backend(other)]


def test_products_are_shared_on_a_mesh(monkeypatch):
    """On a GPU they are not, but on several devices that adds all-reduces of dx."""
    gpu, seen = Forms.for_backend("gpu"), []
    monkeypatch.setattr(Forms, "for_backend", classmethod(lambda *_: gpu))
    for count in (1, 2):
        kind = (AxisType.Auto,)
        mesh = jax.make_mesh((count,), ("tensor",), kind, devices=jax.devices()[:count])
        placed = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("tensor")))
        jax.jit(lambda *x: seen.append(Forms.for_arrays(x)))(placed, jnp.ones(4))
    assert seen == [gpu, dataclasses.replace(gpu, share=True)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_products_lose_no_more_than_a_rounding(x64, dtype):
    """Against NumPy in float64: the same gradients, and an output that is rounded once more.

    XLA's CPU backend has no epilogue. A GPU rounds the base product only in the sum.
    """
    draw = lambda seed, *shape: normal(seed, shape, jnp.float32)
    w, x, g = draw(0, 300, 40).astype(dtype), draw(1, 50, 300).astype(dtype), draw(2, 50, 40)
    g, model = g.astype(dtype), lambda params, x: x @ params["w"]
    start = lora_jax.init(
        jax.random.key(0), {"w": w}, lora_jax.LoraConfig(rank=4, alpha=8), model, x
    )
    base, overlay = lora_jax.split(start)
    a, b = draw(3, 300, 4), draw(4, 4, 40)
    overlay = {"w": dataclasses.replace(overlay["w"], a=a, b=b)}

    @functools.partial(jax.jit, static_argnums=2)
    def run(overlay, x, forms):
        fn = lambda overlay, x: lora_jax.lora(model, forms=forms)(lora_jax.join(base, overlay), x)
        y, pull = jax.vjp(fn, overlay, x)
        moved, dx = pull(g)
        return y, dx, moved["w"].a, moved["w"].b

    x_, w_, a_, b_, g_ = (np.asarray(array, np.float64) for array in (x, w, a, b, g))
    want = (
        x_ @ w_ + 2 * x_ @ a_ @ b_,
        g_ @ w_.T + 2 * g_ @ b_.T @ a_.T,
        2 * x_.T @ (g_ @ b_.T),
        2 * (x_ @ a_).T @ g_,
    )

    def errors(forms):
        pairs = zip(run(overlay, x, forms), want, strict=True)
        return np.array([np.linalg.norm(np.float64(y) - t) / np.linalg.norm(t) for y, t in pairs])

    ours, plain = errors(dataclasses.replace(PLAIN, narrow=True)), errors(PLAIN)
    eps = float(jnp.finfo(dtype).eps)
    assert (ours <= plain * [1.5, 1.05, 1.05, 1.05]).all(), (ours, plain)
    assert (ours < eps).all()


def test_an_update_stays_in_float32_where_the_result_is():
    """A product of 16-bit operands with a float32 result is not narrowed."""
    params, x = {"w": jnp.ones((7, 5), jnp.bfloat16)}, normal(1, (3, 7), jnp.float32)

    def model(params, x):
        return jnp.matmul(x.astype(jnp.bfloat16), params["w"], preferred_element_type=jnp.float32)

    adapted = randomize(
        lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=2), model, x)
    )
    run = lora_jax.lora(model, forms=dataclasses.replace(PLAIN, narrow=True))
    found = equations(jax.make_jaxpr(run)(adapted, x).jaxpr)
    results = [e.outvars[0].aval.dtype for e in found if e.primitive.name == "dot_general"]
    assert results == [jnp.float32, jnp.bfloat16, jnp.float32]  # x·W, x·A, (x·A)·B


def test_products_apart_have_operands_of_their_own():
    """One barrier before the branch and one behind it, forward and backward."""
    model, params, x = qkv(("q",))
    base, adapters = lora_jax.split(params)
    apart = dataclasses.replace(PLAIN, apart=True)

    def barriers(forms):
        run = lora_jax.lora(model, forms=forms)
        loss = lambda adapters, x: sum(y.sum() for y in run(lora_jax.join(base, adapters), x))
        found = equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(adapters, x).jaxpr)
        return sum(e.primitive.name == "optimization_barrier" for e in found)

    assert barriers(PLAIN) == 0 and barriers(apart) == 4
