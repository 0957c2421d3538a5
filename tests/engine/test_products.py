"""The forms of the branch are equal, and each does what it is for."""

import dataclasses
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.engine.forms import PLAIN, Forms
from tests.programs import CASES, normal, randomize
from tests.programs.jaxprs import equations
from tests.programs.table import adapt, merged

FIELDS = [field.name for field in dataclasses.fields(Forms)]
ALL_FORMS = [Forms(*on) for on in itertools.product((False, True), repeat=len(FIELDS))]
NAMES = ("attention", "matmul_transposed", "flax_scan")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=str)
def test_every_combination_of_forms_is_the_merged_model(case, x64, quick_compile):
    built = case.build(jnp.float64)
    fn, _, args = built
    params = adapt(built, case.layouts, jnp.float64)

    @jax.jit
    def run(params):
        return [lora_jax.lora(fn, forms=forms)(params, *args) for forms in ALL_FORMS]

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


def test_backends_get_what_was_measured_there():
    assert Forms.for_backend("cpu") == Forms()
    assert Forms.for_backend("tpu") == Forms(flatten=False, rank_first=False)
    assert Forms.for_backend() == Forms.for_backend(jax.default_backend())
