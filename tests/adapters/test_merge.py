"""merge and unmerge: by hand, in one rounding, reported, and refused on NaN."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraConfig, LoraWeight, MergeError, StructureError
from lora_jax.adapters import merge_leaf
from lora_jax.adapters.merge_leaf import LoopForm
from lora_jax.core import algebra
from tests import devices
from tests.devices import assert_same
from tests.programs import is_node, merged, normal, randomize

pytestmark = pytest.mark.usefixtures("optimized")

KEY = jax.random.key(0)


def joined(dtype=jnp.float32, size=32):
    params = {
        "dense": {"kernel": normal(1, (size, size), dtype), "bias": jnp.zeros(size, dtype)},
        "stack": normal(2, (3, size, size), dtype),
    }
    config = LoraConfig(
        rank=4,
        alpha=2,
        targets=".*(kernel|stack)",
        train=["bias"],
        overrides={"stack": {"layout": "bio"}},
    )
    return randomize(lora_jax.init(KEY, params, config))


def test_the_notes_example_to_the_digit():
    w = jnp.array([[2.0, 4.0, 6.0], [3.0, 6.0, 9.0], [4.0, 8.0, 12.0]])
    a = jnp.array([[2.1], [3.3], [4.8]])
    b = jnp.array([[1.0, 2.2, 3.6]])
    got = lora_jax.merge(LoraWeight(w, a, b, jnp.float32(1), layout=Layout("io")))
    want = [[4.1, 8.62, 13.56], [6.3, 13.26, 20.88], [8.8, 18.56, 29.28]]
    np.testing.assert_array_equal(np.round(np.float64(got), 5), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_merge_is_the_float32_sum_rounded_once(dtype):
    params = joined(dtype)
    got = lora_jax.merge(params)
    assert jax.tree.map(lambda x: x.dtype, got) == {
        "dense": {"kernel": dtype, "bias": dtype},
        "stack": dtype,
    }
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    want = jax.tree.map(lambda x: x.astype(dtype), merged(wide))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        ulp = float(jnp.finfo(dtype).eps) * np.abs(np.asarray(w, np.float32)) + 1e-6
        assert (np.abs(np.asarray(g, np.float32) - np.asarray(w, np.float32)) <= ulp).all()


def test_merge_to_another_dtype():
    params = joined(jnp.bfloat16)
    got = lora_jax.merge(params, jnp.float32)
    assert got["dense"]["kernel"].dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    np.testing.assert_allclose(got["stack"], merged(wide)["stack"], atol=1e-5)


def test_merge_leaves_the_base_alone_and_donation_takes_it():
    params = joined()
    lora_jax.merge(params)
    assert not params["dense"]["kernel"].w.is_deleted()
    kept = lora_jax.merge(params)
    donated = lora_jax.merge(params, donate=True)
    assert params["dense"]["kernel"].w.is_deleted() and params["stack"].w.is_deleted()
    assert not params["dense"]["kernel"].a.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, donated, kept)


def test_unmerge_returns_the_base_within_rounding():
    params = joined()
    base, adapters = lora_jax.split(params)
    back = lora_jax.unmerge(lora_jax.merge(params), adapters)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(back["dense"]["kernel"].w, base["dense"]["kernel"], atol=1e-5)
    merged_tree = lora_jax.merge(params)
    lora_jax.unmerge(merged_tree, adapters, donate=True)
    assert merged_tree["stack"].is_deleted()


def test_the_error_that_rounding_makes():
    """An update of one part in a thousand is mostly lost in bfloat16, and the report says so."""
    params = joined(jnp.bfloat16, size=128)
    shrink = lambda n: dataclasses.replace(n, b=n.b * 1e-3) if isinstance(n, LoraWeight) else n
    params = jax.tree.map(shrink, params, is_leaf=is_node)
    _, errors = lora_jax.merge(params, return_error=True)
    assert set(errors) == {"dense/kernel", "dense/bias", "stack"}
    assert 0.5 < errors["dense/kernel"] < 1.2 and errors["dense/bias"] == 0
    _, exact = lora_jax.merge(params, jnp.float32, return_error=True)
    assert exact["dense/kernel"] == 0
    w = np.asarray(params["dense"]["kernel"].w, np.float64)
    node = params["dense"]["kernel"]
    update = np.float64(node.a) @ np.float64(node.b) * np.float64(node.scale)
    applied = np.asarray(lora_jax.merge(params)["dense"]["kernel"], np.float64) - w
    want = np.linalg.norm(applied - update) / np.linalg.norm(update)
    np.testing.assert_allclose(errors["dense/kernel"], want, rtol=1e-3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("field", ["a", "b", "scale"])
def test_values_that_are_not_finite_are_refused_before_anything_is_lost(field, bad):
    params = joined()
    node = params["stack"]
    value = getattr(node, field)
    params["stack"] = dataclasses.replace(node, **{field: value.at[(0,) * value.ndim].set(bad)})
    with pytest.raises(MergeError, match=f"stack: {field}"):
        lora_jax.merge(params, donate=True)
    assert not params["dense"]["kernel"].w.is_deleted()


def test_merge_under_jit():
    params = joined()
    chained = jax.jit(lora_jax.merge)(params)
    np.testing.assert_allclose(chained["stack"], lora_jax.merge(params)["stack"], atol=1e-5)


def test_donation_of_an_array_that_stands_in_two_places():
    params = joined()
    params["twin"] = params["stack"]
    kept = lora_jax.merge(params)
    jax.tree.map(np.testing.assert_array_equal, lora_jax.merge(params, donate=True), kept)
    _, adapters = lora_jax.split(params)
    kept["twin"] = kept["stack"]
    back = lora_jax.unmerge(kept, adapters)
    donated = lora_jax.unmerge(kept, adapters, donate=True)
    jax.tree.map(np.testing.assert_array_equal, donated, back)


def test_refusals():
    params = joined()
    with pytest.raises(lora_jax.ConfigError, match="int8"):
        lora_jax.merge(params, jnp.int8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with pytest.raises(StructureError, match="only shapes: dense/bias"):
        lora_jax.merge(shapes)
    _, adapters = lora_jax.split(params)
    with pytest.raises(StructureError, match=r"dense/kernel.*join"):
        lora_jax.merge(adapters["dense"] and {"dense": {"kernel": adapters["dense"]["kernel"]}})
    with pytest.raises(StructureError, match="not in the base"):
        lora_jax.unmerge({"other": jnp.ones(3)}, adapters)


STACKS = {
    "bio": (5, 32, 24),
    "bbio": (2, 3, 32, 24),
    "ibo": (32, 5, 24),
    "boio": (5, 4, 32, 8),
    "bibo": (2, 32, 3, 24),
}


def stacked(axes, dtype, rank=4):
    layout, shape = Layout(axes), STACKS[axes]
    a, b = layout.a_shape(shape, rank), layout.b_shape(shape, rank)
    layers = layout.select("b", shape)
    scale = jnp.arange(1.0, 1 + math.prod(layers)).reshape(layers) / 4
    factors = normal(2, a, jnp.float32), normal(3, b, jnp.float32), scale
    return LoraWeight(normal(1, shape, dtype), *factors, layout=layout)


def at_once(node, dtype):
    return jax.jit(algebra.dense, static_argnums=1)(node, dtype)


def assert_sums(got, node):
    """To the bit; where XLA adds rank + 1 terms in another order, to what float32 then allows."""
    if node.layout.axes != "boio":
        assert_same(got, at_once(node, got.dtype))
        return
    sums = np.asarray(at_once(node, jnp.float32))
    terms = at_once(jax.tree.map(lambda x: abs(x.astype(jnp.float32)), node), jnp.float32)
    allowed = node.rank * np.finfo(np.float32).eps * np.asarray(terms)
    low, high = (x.astype(got.dtype) for x in (sums - allowed, sums + allowed))
    assert ((low <= np.asarray(got)) & (np.asarray(got) <= high)).all()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        pytest.param(jnp.float32, jnp.bfloat16, marks=SLOW),
        pytest.param(jnp.bfloat16, jnp.float32, marks=SLOW),
    ],
)
@pytest.mark.parametrize("axes", STACKS)
def test_a_stack_is_merged_layer_by_layer_to_the_same_values(axes, dtype, target):
    node = stacked(axes, dtype)
    got = lora_jax.merge(node, target)
    assert got.dtype == target and got.shape == node.w.shape
    assert_sums(got, node)
    if dtype == target:
        back = lora_jax.unmerge(got, lora_jax.split(node)[1]).w
        negative = dataclasses.replace(node, w=got, scale=-node.scale)
        assert_sums(back, negative)


def compiled(node, dtype, donate=False):
    base, rest = lora_jax.split(node)
    fn = merge_leaf.sum_donated if donate else merge_leaf.sum_kept
    form = merge_leaf.choose_form(base, rest)
    return fn.lower(base, rest, target=jnp.dtype(dtype), form=form).compile()


@pytest.mark.parametrize("donate", [True, False], ids=["donated", "kept"])
@pytest.mark.parametrize("axes", STACKS)
def test_a_stack_is_merged_in_the_memory_of_one_layer(axes, donate):
    node = stacked(axes, jnp.float32)
    layers = node.scale.size
    program = compiled(node, jnp.float32, donate)
    # One layer's update, that layer's factors, and a kilobyte of loop counters and their like.
    one = (node.w.nbytes + node.a.nbytes + node.b.nbytes) // layers + 1024
    assert program.memory_analysis().temp_size_in_bytes <= one
    assert program.memory_analysis().alias_size_in_bytes == (node.w.nbytes if donate else 0)
    # XLA counts a loop's body once.
    floor = (2 * node.rank + 1) * node.w.size / layers + node.b.size / layers
    assert program.cost_analysis()["flops"] <= 1.1 * floor


def test_narrowing_a_stack_makes_one_layer_in_float32():
    node = stacked("bio", jnp.float32)
    program = compiled(node, jnp.bfloat16)
    # A CPU's loop carries 16-bit floats as integers, and the result is one more copy of them.
    one = (node.w.nbytes + node.a.nbytes + node.b.nbytes) // 5 + 1024
    assert program.memory_analysis().temp_size_in_bytes <= one + node.w.nbytes // 2


def test_the_error_of_a_stack_is_that_of_all_its_layers():
    node = stacked("bbio", jnp.bfloat16)
    node = dataclasses.replace(node, b=node.b * 1e-2)
    _, errors = lora_jax.merge({"w": node}, return_error=True)
    exact = np.asarray(at_once(node, jnp.float32), np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    update = np.linalg.norm(exact - np.asarray(node.w, np.float64))
    np.testing.assert_allclose(errors["w"], np.linalg.norm(rounded - exact) / update, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["32", "16"])
def test_gradients_flow_through_the_merge_of_a_stack(dtype):
    node = stacked("bio", dtype)

    def gradient(fn):
        square = lambda a: (fn(dataclasses.replace(node, a=a)).astype(jnp.float32) ** 2).sum()
        return jax.grad(square)(node.a)

    want = gradient(algebra.dense)
    assert float(abs(want).max()) > 1
    np.testing.assert_allclose(gradient(lora_jax.merge), want, rtol=1e-4, atol=1e-3)


def test_a_stack_that_lies_on_several_devices_stays_there():
    mesh = jax.sharding.Mesh(np.array(devices.some(2)), ("x",))
    node = stacked("bbio", jnp.float32)
    want = lora_jax.merge(node)
    for spec, form in ((("x",), LoopForm.WHOLE), ((None, None, "x"), LoopForm.LAYERS)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        spread = dataclasses.replace(node, w=jax.device_put(node.w, sharding))
        assert merge_leaf.choose_form(spread.w, spread) is form
        got = lora_jax.merge(spread)
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_base_of_numpy():
    node = stacked("bio", jnp.float32)
    got = lora_jax.merge(dataclasses.replace(node, w=np.asarray(node.w)))
    np.testing.assert_array_equal(got, lora_jax.merge(node))


def test_merges_what_a_jitted_function_closes_over():
    params = lora_jax.LoraWeight(
        jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.float32(2), layout=Layout("io")
    )
    np.testing.assert_array_equal(jax.jit(lambda: lora_jax.merge(params))(), jnp.full((3, 2), 3.0))
