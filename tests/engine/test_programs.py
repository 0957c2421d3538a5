"""Every program of the table: adapted equals merged, and nothing weight-sized is computed."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.devices import assert_same
from tests.programs import CASES, DENSE_CASES, Case, a_few, adapt, is_node, merged
from tests.programs.forms import ALL_ON, GPU
from tests.programs.jaxprs import squeezed, weight_sized

ALL = CASES + DENSE_CASES
# What two orders of adding float32 (float64) products of sizes below 20 may differ by.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]


def assert_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        scale = max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(np.asarray(g) / scale, np.asarray(w) / scale, atol=tolerance)


def loss(outs):
    return sum(
        jnp.sin(x * (1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 3)).sum()
        for x in floats(outs)
    )


@functools.cache
def prepare(case: Case, dtype):
    built = case.build(dtype)
    fn, _, args = built
    params = adapt(built, case.layouts, dtype)
    adapted = lora_jax.lora(fn, on_dense="allow" if case.dense else "error")
    return fn, adapted, params, args


def check_equal_to_merged(case: Case, dtype):
    check_equal(case, *prepare(case, dtype), TOLERANCE[jnp.dtype(dtype).name])


def check_equal(case: Case, fn, adapted, params, args, tolerance):
    """Compare outputs and gradients (or tangents) of `adapted` with `fn` on merged weights."""
    (got, moved), (want, wanted) = compare(case, fn, adapted, params, args)
    assert_close(got, want, tolerance)
    assert_close(moved, wanted, tolerance)
    if case.differentiable and case.reverse:
        assert max(np.abs(x).max() for x in jax.tree.leaves(moved[0])) > 1e-3


def compare(case: Case, fn, adapted, params, args):
    """Return (outputs, gradients or tangents) of `adapted` and of `fn` on merged weights.

    The gradients are those by the adapters and by the arguments that are floating.
    """

    def oracle(params, *args):
        # scale is frozen in the library, so it must be here
        freeze = lambda n: dataclasses.replace(n, scale=jax.lax.stop_gradient(n.scale))
        frozen = jax.tree.map(lambda n: freeze(n) if is_node(n) else n, params, is_leaf=is_node)
        return fn(merged(frozen), *args)

    def run(model, params, args):
        base, adapters = lora_jax.split(params)
        inputs = tuple(x for x in args if jnp.issubdtype(x.dtype, jnp.floating))

        def value(adapters, inputs):
            values = iter(inputs)
            inputs = [next(values) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]
            return loss(model(lora_jax.join(base, adapters), *inputs))

        outs = model(params, *args)
        if not case.differentiable:
            return outs, ()
        if case.reverse:
            return outs, jax.grad(value, (0, 1))(adapters, inputs)
        moved = jax.tree.map(jnp.cos, (adapters, inputs))
        return outs, jax.jvp(value, (adapters, inputs), moved)

    return jax.jit(lambda *values: (run(adapted, *values), run(oracle, *values)))(params, args)


# In float64 the comparison is the sharper one, so there it is of all programs.
@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_the_merged_model(case, quick_compile):
    check_equal_to_merged(case, jnp.float32)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_the_merged_model_in_float64(case, x64, quick_compile):
    check_equal_to_merged(case, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("forms", [GPU, ALL_ON], ids=["gpu", "all on"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_the_merged_model_in_other_forms(case, forms, x64, quick_compile):
    fn, _, params, args = prepare(case, jnp.float64)
    adapted = lora_jax.lora(fn, on_dense="allow" if case.dense else "error", forms=forms)
    check_equal(case, fn, adapted, params, args, TOLERANCE["float64"])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_layouts_are_inferred(case):
    params = prepare(case, jnp.float32)[2]
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): node.layout.axes
        for path, node in nodes
        if is_node(node)
    }
    assert found == case.layouts


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", a_few(ALL), ids=str)
def test_the_start_is_the_base_to_the_bit(case):
    fn, adapted, params, args = prepare(case, jnp.float32)
    base, _ = lora_jax.split(params)
    config = lora_jax.LoraConfig(rank=2, targets=list(case.layouts))
    start = lora_jax.init(jax.random.key(0), base, config, fn, *args)
    # Functions of their own, for jit remembers what was compiled with `quick_compile`.
    got = jax.jit(lambda *args: adapted(*args))(start, *args)
    want = jax.jit(lambda *args: fn(*args))(base, *args)
    jax.tree.map(assert_same, got, want)


# --- nothing weight-sized -------------------------------------------------------------------------


def views_of(shape, axes):
    """Return the shape of a weight and that of one of its layers."""
    yield squeezed(shape)
    yield squeezed([size for size, axis in zip(shape, axes, strict=True) if axis != "b"])


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.shapes_collide and not c.small], ids=str
)
def test_nothing_weight_sized_is_made(case):
    """Forward and backward contain no more arrays of a weight's shape than the base model's."""
    fn, adapted, params, args = prepare(case, jnp.float32)
    nodes = [n for n in jax.tree.leaves(params, is_leaf=is_node) if is_node(n)]
    shapes = {view for n in nodes for view in views_of(n.w.shape, n.layout.axes)}
    base, adapters = lora_jax.split(params)
    got = weight_sized(jax.make_jaxpr(adapted)(params, *args).jaxpr, shapes)
    allowed = weight_sized(jax.make_jaxpr(fn)(base, *args).jaxpr, shapes)
    assert got <= allowed
    if not case.reverse:
        return

    def ours(adapters, base):
        return loss(adapted(lora_jax.join(base, adapters), *args))

    def frozen(x, base):
        return loss(fn(base, x, *args[1:]))

    got = weight_sized(jax.make_jaxpr(jax.grad(ours))(adapters, base).jaxpr, shapes)
    x = args[0]
    if jnp.issubdtype(x.dtype, jnp.floating):
        allowed = weight_sized(jax.make_jaxpr(jax.grad(frozen))(x, base).jaxpr, shapes)
    else:  # tokens have no gradient, so there the model alone is the measure, forward and back
        allowed = weight_sized(
            jax.make_jaxpr(jax.grad(lambda b: loss(fn(b, *args))))(base).jaxpr, shapes
        )
        # dW takes part there; ours must be below it
        assert sum(got.values()) < sum(allowed.values())
    assert got <= allowed


def test_the_assertion_sees_a_dense_update():
    """The measure itself: a program that forms W + A·B is caught."""
    case = next(c for c in CASES if c.name == "dense")
    fn, _, params, args = prepare(case, jnp.float32)
    shapes = set(views_of(params["kernel"].w.shape, "io"))
    got = weight_sized(jax.make_jaxpr(lambda p, x: fn(merged(p), x))(params, *args).jaxpr, shapes)
    assert sum(got.values()) >= 2


# --- where the weight must be made dense ----------------------------------------------------------


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_fallback_warns_once_a_site(case):
    fn, _, params, args = prepare(case, jnp.float32)
    (path,) = case.layouts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.make_jaxpr(lora_jax.lora(fn))(params, *args)
    messages = [str(w.message) for w in caught if w.category is lora_jax.DenseWarning]
    assert len(messages) == len(set(messages)) == 1
    assert path in messages[0] and f"`{case.dense}`" in messages[0] and ".py:" in messages[0]


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_fallback_can_be_refused(case):
    fn, _, params, args = prepare(case, jnp.float32)
    with pytest.raises(lora_jax.DenseError, match=case.dense):
        lora_jax.lora(fn, on_dense="error")(params, *args)


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", a_few([c for c in CASES if c.reverse and c.vmappable]), ids=str)
def test_composes_with_remat_vmap_and_scan(case, quick_compile):
    fn, adapted, params, args = prepare(case, jnp.float32)

    @jax.jit
    def losses(params, args):
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), args)
        mapped = jax.vmap(adapted, in_axes=(None, *(0 for _ in args)))(params, *twice)
        _, scanned = jax.lax.scan(lambda c, a: (c, loss(adapted(params, *a))), None, twice)
        return (
            loss(jax.checkpoint(adapted)(params, *args)),
            loss(jax.tree.map(lambda x: x[1], mapped)),
            scanned[1],
            loss(fn(merged(params), *args)),
        )

    *ours, want = losses(params, args)
    np.testing.assert_allclose(ours, jnp.stack([want] * 3), rtol=1e-4, atol=1e-3)
