"""Meshes with explicit axes: each program equals the merged model on one device, in float64."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import lora_jax
from lora_jax.core.quantized.weight import quantize_array
from lora_jax.core.sharding.quantized import field_specs
from tests.programs import is_node, merged, normal
from tests.programs.explicit import EXPLICIT, At

NOWHERE = At(None)
#: Programs of which every way to place the factors is tested by default, and not as a slow test.
FEW = {"columns_then_rows", "lookup_and_attend"}
#: Programs that are left to the slow tests: others have their products in simpler forms.
SLOW = {
    *("attention", "concatenated", "convolution_in_groups", "matrix"),
    *("scan_of_a_checkpoint", "weights_that_share_an_activation"),
}


def few(default, values):
    """Return the values as test parameters, slow but for those of the default suite."""
    slow = pytest.mark.slow
    return [pytest.param(value, marks=[] if value in default else slow) for value in values]


def make_mesh():
    return jax.make_mesh((2, 2), ("d", "m"))  # the default: explicit axes


def adapt(at, name, **options):
    """Return (fn, adapted, args) with random A and B where `init` places them."""
    fn, params, args = EXPLICIT[name](at)
    config = lora_jax.LoraConfig(2, targets=list(params), dtype=jnp.float64, **options)
    adapted = lora_jax.init(jax.random.key(0), params, config, fn, *args)

    def fill(node):
        a, b = (like(normal(i, x.shape, "float64"), x) for i, x in ((5, node.a), (6, node.b)))
        return dataclasses.replace(node, a=a, b=b)

    def like(x, placed):
        on_mesh = isinstance(placed.sharding, NamedSharding)
        return jax.device_put(x, placed.sharding) if on_mesh else x

    return fn, jax.tree.map(fill, adapted, is_leaf=is_node), args


def place(at, adapted, how):
    """Return the tree with its factors on no mesh, or replicated, or sharded as their weight is."""

    def one(node):
        if getattr(node.w.sharding, "spec", None) is None:
            return node
        kinds = {"a": ("b", "i", None), "b": ("b", None, "o"), "scale": ("b",)}
        spec = [*node.w.sharding.spec, *[None] * node.w.ndim]
        placed = {}
        for field, parts in kinds.items():
            entries = []
            for part in parts:
                where = node.layout.positions(part) if part else ()
                entries += [spec[i] for i in where] if part else [None]
            x = getattr(node, field)
            x = jnp.asarray(np.asarray(x))
            entries = entries if how == "as the weight" else ()
            placed[field] = x if how == "on no mesh" else at.put(x, *entries)
        return dataclasses.replace(node, **placed)

    return jax.tree.map(one, adapted, is_leaf=is_node)


def loss(fn, base, args, adapters):
    outs = fn(lora_jax.join(base, adapters), *args)
    return jnp.sin(outs * 1.3).sum()


def value_and_gradients(fn, adapted, args):
    """Return the loss and its gradients by what trains."""
    base, adapters = lora_jax.split(adapted)
    run = lora_jax.lora(fn, on_dense="error")

    @jax.jit
    def step(base, adapters, args):
        by_adapters = jax.value_and_grad(loss, 3, allow_int=True)
        return by_adapters(run, base, args, adapters)

    value, grads = step(base, adapters, args)
    return value, [x for x in jax.tree.leaves(grads) if jnp.issubdtype(x.dtype, jnp.floating)]


def same(got, want):
    """Assert that two trees are equal up to the rounding of float64."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, got, want)


@functools.cache
def oracle(name):
    """Return outputs and gradients of the merged model on one device, and its weights."""
    fn, adapted, args = adapt(NOWHERE, name)
    base, adapters = lora_jax.split(adapted)

    def run(params, *args):
        freeze = lambda n: dataclasses.replace(n, scale=jax.lax.stop_gradient(n.scale))
        return fn(merged(jax.tree.map(freeze, params, is_leaf=is_node)), *args)

    grads = jax.jit(jax.grad(functools.partial(loss, run, base, args)))(adapters)
    return jax.jit(run)(adapted, *args), jax.tree.leaves(grads), merged(adapted)


def check(name, how, in_mesh):
    want, grads, weights = oracle(name)
    at = At(make_mesh())
    with jax.set_mesh(at.mesh) if in_mesh else contextlib.nullcontext():
        fn, adapted, args = adapt(at, name)
        if how:
            adapted = place(at, adapted, how)
        base, _ = lora_jax.split(adapted)
        run = lora_jax.lora(fn, on_dense="error")

        @jax.jit
        def together(adapted, base, args):  # one program compiles faster than four
            return run(adapted, *args), fn(base, *args), lora_jax.merge(adapted)

        got, plain, merge = together(adapted, base, args)
        _, moved = value_and_gradients(fn, adapted, args)
        merges = merge, lora_jax.merge(adapted)
    same(got, want)
    assert got.sharding.is_equivalent_to(plain.sharding, got.ndim)
    same(moved, grads)
    for merge in merges:
        same(merge, weights)


@pytest.mark.parametrize("name", few([name for name in EXPLICIT if name not in SLOW], EXPLICIT))
def test_as_init_leaves_the_factors(name, x64, quick_compile):
    check(name, None, in_mesh=False)


@pytest.mark.parametrize("in_mesh", [False, True])
@pytest.mark.parametrize("how", [None, "on no mesh", "replicated", "as the weight"])
@pytest.mark.parametrize("name", few(FEW, EXPLICIT))
def test_wherever_the_factors_are(name, how, in_mesh, x64, quick_compile):
    check(name, how, in_mesh)


def on_both(build, check):
    """Run `check(fn, adapted, args)` on the mesh and on one device; the results are equal."""
    got, want = (check(*build(at)) for at in (At(make_mesh()), NOWHERE))
    same(got, want)
    return want


@pytest.mark.parametrize(
    "name",
    few(["columns_then_rows", "experts"], ["columns_then_rows", "convolution", "scan", "experts"]),
)
def test_dropout_drops_what_it_drops_on_one_device(name, x64, quick_compile):
    def build(at, on=True):
        fn, adapted, args = adapt(at, name, dropout=0.5)
        return fn, lora_jax.with_dropout(adapted, jax.random.key(3)) if on else adapted, args

    dropped, _ = on_both(build, value_and_gradients)
    with pytest.warns(UserWarning, match="no random key"):
        kept, _ = value_and_gradients(*build(NOWHERE, on=False))
    assert abs(dropped - kept) > 1e-3


@pytest.mark.parametrize(
    "name",
    few(
        FEW,
        ["columns_then_rows", "convolution", "scan_of_a_checkpoint", "inputs_and_outputs_sharded"],
    ),
)
def test_dora(name, x64, quick_compile):
    on_both(lambda at: adapt(at, name, dora=True), value_and_gradients)


@pytest.mark.parametrize("spec", few([("m",)], [(), ("m",), (None, "m")]))
def test_trained_rows_of_an_embedding(spec, x64, quick_compile):
    """The rows lie along the sharded axis, beside it, or nothing is sharded."""

    def build(at):
        _, params, args = EXPLICIT["lookup_and_attend"](NOWHERE)
        lookup = lambda p, ids: jnp.sin(p["e"].at[ids].get(out_sharding=at.spec("d")))
        params = {"e": at.put(params["e"], *spec)}
        config = lora_jax.LoraConfig(2, targets=[], rows={"e": (1, 3)}, dtype=jnp.float64)
        adapted = lora_jax.init(jax.random.key(0), params, config, lookup, *args)
        node = adapted["e"]
        np.testing.assert_array_equal(node.value, np.asarray(params["e"])[[1, 3]])
        node = dataclasses.replace(node, value=node.value + 1)
        return lookup, {"e": node}, [at.put(args[0], "d")]

    def check(fn, adapted, args):
        plain = jax.jit(lora_jax.merge)(adapted)
        np.testing.assert_array_equal(plain["e"], lora_jax.merge(adapted)["e"])
        np.testing.assert_allclose(fn(plain, *args), lora_jax.lora(fn)(adapted, *args), rtol=1e-9)
        return value_and_gradients(fn, adapted, args), plain

    on_both(build, check)


def quantize(tree, axis):
    """Quantize weights to int8 along their in axis or their last one; codes lie as they did."""

    def one(node):
        at = node.layout.axes.index("i") if axis == "in" else -1
        w = quantize_array(jnp.asarray(np.asarray(node.w)), "int8", at)
        sharding = node.w.sharding
        if isinstance(sharding, NamedSharding):
            specs = field_specs(w, sharding.spec, sharding.mesh.shape)
            put = lambda name, x: jax.device_put(x, sharding.update(spec=specs[name]))
            fields = {name: put(name, x) for name, x in w.fields.items()}
            w = dataclasses.replace(w, fields=fields)
        return dataclasses.replace(node, w=w)

    return jax.tree.map(one, tree, is_leaf=is_node)


def dequantize(tree):
    """Return the tree on one device, with arrays for bases."""
    one = lambda node: dataclasses.replace(node, w=node.w.dequantize())
    tree = jax.tree.map(one, tree, is_leaf=is_node)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


@pytest.mark.parametrize("axis", ["in", pytest.param("last", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    few(["inputs_and_outputs_sharded"], [n for n in EXPLICIT if n != "weight_on_no_mesh"]),
)
def test_a_quantized_base(name, axis, x64, quick_compile):
    with jax.set_mesh(make_mesh()) as mesh:
        fn, adapted, args = adapt(At(mesh), name)
        quantized = quantize(adapted, axis)
        got = jax.jit(derived(lora_jax.lora(fn, on_dense="allow")))(quantized, args)
    plain = EXPLICIT[name](NOWHERE)[0]
    here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), args)
    want = jax.jit(derived(lora_jax.lora(plain)))(dequantize(quantized), here)
    assert_close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-9)
    jax.tree.map(assert_close, got, want)


def derived(fn):
    """Return a function of (params, args) that returns outputs, and gradients of factors."""

    def loss(adapters, base, args):
        out = fn(lora_jax.join(base, adapters), *args)
        return jnp.sin(out).sum(), out

    def run(params, args):
        base, adapters = lora_jax.split(params)
        grads, out = jax.grad(loss, has_aux=True)(adapters, base, args)
        return out, grads

    return run
