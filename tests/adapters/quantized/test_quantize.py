"""`quantize` and `dequantize`: which axis has the blocks, what is refused, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.core.quantized import layerwise
from tests import devices

KEY = jax.random.key(0)


def model(params, ids):
    """A tied table, a scan over layers, attention kernels of three axes, and experts."""
    x = params["table"][ids]

    def layer(x, w):
        heads = jnp.einsum("te,ehd->thd", x, w["query"])
        return x + jnp.einsum("thd,hde->te", jnp.tanh(heads), w["out"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = x + jnp.einsum("te,xef->tf", x, params["experts"]) + params["bias"][None]
    return x @ params["table"].T


SHAPES = {
    "table": (9, 64),
    "layers": {"query": (2, 64, 2, 32), "out": (2, 2, 32, 64)},
    "experts": (3, 64, 64),
    "bias": (64,),
}
IDS = jnp.arange(4)


@pytest.fixture(scope="module")
def params():
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: jax.random.normal(KEY, s), SHAPES, is_leaf=is_shape)


def by_int4(w, axis, block=32):
    """Return what int4 blocks along an axis stand for, in numpy."""
    w = np.moveaxis(np.asarray(w), axis, -1)
    blocks = w.reshape(*w.shape[:-1], -1, block)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(blocks / scale), -7, 7)
    return np.moveaxis((codes * scale).reshape(w.shape), -1, axis)


def test_blocks_lie_along_the_axis_that_products_sum_over(params):
    got = lora.quantize(params, "int4", model, IDS, targets=["table", "layers", "experts"])
    axes = {"table": 1, "query": 1, "out": 2, "experts": 1}
    flat = {"table": got["table"], "experts": got["experts"], **got["layers"]}
    want = {"table": params["table"], "experts": params["experts"], **params["layers"]}
    assert {name: w.axis % w.ndim for name, w in flat.items()} == axes
    for name, w in flat.items():
        dense = lora.dequantize(w)
        np.testing.assert_allclose(dense, by_int4(want[name], axes[name]), rtol=1e-6)
    assert got["bias"] is params["bias"]
    assert lora.quantize(got, "int4", targets=["table"])["table"] is got["table"]  # it is already
    shapes = jax.eval_shape(lambda p: p, params)
    abstract = lora.quantize(shapes, "int4", model, IDS, targets=["table", "layers", "experts"])
    assert abstract == jax.eval_shape(lambda p: p, got)
    config = lora.LoraConfig(rank=2, targets=["table", "layers"])
    adapted = lora.init(KEY, params, config, model, IDS)
    joined = lora.quantize(adapted, "int4", targets=["table", "layers"])
    assert joined["table"].w.axis == -1 and joined["layers"]["out"].w.axis == -2
    assert joined["table"].a is adapted["table"].a


def test_without_the_function_shapes_and_names_decide():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    params = {"kernel": shape(32, 96), "conv": shape(3, 3, 32, 4), "embedding": shape(5, 32)}
    got = lora.quantize(params, "int4", targets=["kernel", "conv", "embedding"])
    assert {name: (w.axis, w.dtype) for name, w in got.items()} == {
        name: (axis, jnp.bfloat16)
        for name, axis in (("kernel", -2), ("conv", -2), ("embedding", -1))
    }
    assert lora.quantize(params, "int8", axes={"kernel": 1})["kernel"].axis == -1
    mixed = lora.quantize(params, {"conv": "int8", ".*": "int4"}, targets=["conv", "kernel"])
    assert (mixed["conv"].kind, mixed["kernel"].kind) == ("int8", "int4")


def test_all_that_cannot_be_quantized_is_listed(params):
    weights = {f"h{i}": {"kernel": jnp.ones((48, 3))} for i in range(5)}
    cases = [
        (weights, "nf4", {}, "5 weights .*blocks of 64 .nf4. do not divide axis 0 of .48, 3.*int8"),
        ({"k": jnp.ones((1, 2))}, "int8", {}, "k: it would take 40 bits per number"),
        ({"k": jnp.full((64, 2), jnp.nan)}, "nf4", {}, "k: contains NaN, infinity or numbers too"),
        (
            {"k": jnp.full((64, 2), 1e7)},
            "int4",
            {},
            "k: contains NaN, infinity or numbers too",
        ),  # of float16
        ({"k": jnp.ones((64, 2), int)}, "nf4", {"targets": ["k"]}, "k: int32 cannot be quantized"),
        (params, "nf4", {}, "layers/query: the shape .* Pass the function .*axes="),
        ({"k": jnp.ones((64, 2))}, "nf5", {}, "kind 'nf5' is not one of"),
        ({"k": jnp.ones((64, 2))}, {"q": "nf4"}, {}, "k: no pattern in kind matches it"),
        ({"k": jnp.ones((64, 2))}, {"k": "nf4", "q": "nf4"}, {}, "'q' applies to no target"),
        ({"k": jnp.ones((64, 2))}, "nf4", {"axes": {"q": 0}}, "axes: 'q' matches no path"),
        ({"k": jnp.ones((64, 2))}, "nf4", {"axes": {"k": 2}}, "k: axis 2 of the blocks"),
        (
            {"k": lora.quantize({"k": jnp.ones((64, 2))}, "nf4")["k"]},
            "int8",
            {},
            "k: is nf4 already",
        ),
    ]
    for tree, kind, options, message in cases:
        with pytest.raises(lora.LoraError, match=message):
            lora.quantize(tree, kind, **options)
    left_out = lambda p, x: x @ jnp.tanh(p["k"]) @ p["other"]
    tree = {"k": jnp.ones((64, 64)), "other": jnp.ones((64, 64))}
    with pytest.warns(lora.LeftOutWarning, match="Name it in targets= to quantize it"):
        lora.quantize(tree, "nf4", left_out, jnp.ones((2, 64)))


def test_floating_weights_are_deleted_on_request():
    w, other = jnp.ones((32, 3)), jnp.ones((32, 2))
    tied = lora.quantize({"a": w, "b": w, "c": other}, "int4", targets=["a", "b"], donate=True)
    assert w.is_deleted() and not other.is_deleted()
    assert tied["a"] is tied["b"]
    shared = {"a": other, "also_trained": other}
    lora.quantize(shared, "int4", targets=["a"], donate=True)
    assert not other.is_deleted()  # the tree still has it


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_float32_values_of_one_layer_at_a_time(optimized, dtype):
    one = 4 * 256 * 128
    whole = layerwise._whole("nf4", -2, ()).lower(jax.ShapeDtypeStruct((256, 128), dtype))
    stack = jax.ShapeDtypeStruct((6, 256, 128), dtype)
    found = jax.eval_shape(layerwise._whole("nf4", -2, ()), stack)
    in_turn = layerwise._one_in_turn("nf4", -2, ()).lower(found, stack, (0,))
    for lowered in (whole, in_turn):
        assert devices.temporary_bytes(lowered.compile()) < 2 * one


@pytest.mark.parametrize(
    "kind_of_axis", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_codes_are_sharded_as_their_weight_is(kind_of_axis):
    mesh = devices.make_mesh((2, 2), ("x", "y"), axis_types=(kind_of_axis,) * 2)
    w = jax.random.normal(KEY, (2, 128, 8))
    want = lora.quantize({"w": w}, "int4", axes={"w": 1})["w"]
    wide = lora.quantize({"w": w}, "int8", axes={"w": 1})["w"]
    for spec in (P(None, "x", "y"), P("y", "x")):
        own = NamedSharding(mesh, spec)
        placed = jax.device_put(w, own)
        for kind, equal in (("int4", want), ("int8", wide)):
            got = lora.quantize({"w": placed}, kind, axes={"w": 1})["w"]
            jax.tree.map(np.testing.assert_array_equal, got, equal)
            assert got.fields["codes"].sharding.is_equivalent_to(own, 3)
            dense = lora.dequantize(got)
            assert dense.sharding.is_equivalent_to(own, 3)
            shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=own)
            shapes = lora.quantize({"w": shape}, kind, axes={"w": 1})["w"]
            same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, 3)
            assert jax.tree.all(jax.tree.map(same, shapes, got))
    placed = jax.device_put(w, NamedSharding(mesh, P(None, ("x", "y"))))
    with pytest.raises(lora.ConfigError, match=r"w: blocks of 64 .nf4. do not divide the part of"):
        lora.quantize({"w": placed}, "nf4", axes={"w": 1})


@pytest.mark.parametrize("kind_of_axis", [AxisType.Auto, AxisType.Explicit])
def test_adapters_are_placed_as_the_codes_are(kind_of_axis):
    mesh = devices.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind_of_axis,) * 2)
    own = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    stack = lambda params, x: jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]
    w = jax.device_put(jax.random.normal(KEY, (2, 64, 96)), own)
    params, x = lora.quantize({"w": w}, "int4", axes={"w": 1}), jnp.ones((4, 64))
    config = lora.LoraConfig(rank=2, layers=[1])
    wanted = lora.shardings(params, config, stack, x)
    assert wanted["w"].w.fields == {"codes": own, "scales": own}
    assert wanted["w"].b.spec == P(None, None, "tensor")
    make = lambda params: lora.init(KEY, params, config, stack, x)
    for made in (make(params), jax.jit(make, out_shardings=wanted)(params)):
        same = lambda sharding, x: sharding.is_equivalent_to(x.sharding, x.ndim)
        assert jax.tree.all(jax.tree.map(same, wanted, made))
