"""merge with quantized bases: to floating numbers, to codes, reported, and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, Layout, LoraWeight, MergeError, TrainedLeaf, TrainedRows
from lora_jax.adapters import merge_leaf
from lora_jax.adapters.merge_leaf import merge_layer, take_layer
from lora_jax.core.quantized.coding import Coding
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized, quantize_array
from tests.devices import assert_same
from tests.programs import normal

SIZE, OUT, RANK = 256, 24, 4
# the others search for their scales, which takes long to compile and may end a little elsewhere
EXACT = [
    pytest.param(kind, marks=[] if kind in ("nf4", "int4_zero") else pytest.mark.slow)
    for kind in WRITABLE
    if not kind.endswith("_k")
]


def node(kind="nf4", size=0.02, batch=(), dtype=jnp.float32, dora=False):
    w = quantize_array(normal(1, (*batch, SIZE, OUT), dtype), kind, -2)
    a, b = normal(2, (*batch, SIZE, RANK), jnp.float32), normal(3, (*batch, RANK, OUT), jnp.float32)
    scale = jnp.full(batch, 0.5)
    magnitude = 1 + abs(normal(4, (*batch, OUT), jnp.float32)) if dora else None
    return LoraWeight(w, a, size * b, scale, magnitude, layout=Layout("b" * len(batch) + "io"))


def exact(leaf):
    """The merged leaf in float64."""
    w, a, b = (np.asarray(x, np.float64) for x in (leaf.w.dequantize(), leaf.a, leaf.b))
    total = w + np.asarray(leaf.scale, np.float64).reshape(-1, *[1] * 2)[: len(w)] * (a @ b)
    total = total.reshape(w.shape)
    if leaf.magnitude is None:
        return total
    norms = np.linalg.norm(total, axis=-2, keepdims=True)
    return total / norms * np.asarray(leaf.magnitude, np.float64)[..., None, :]


@pytest.mark.parametrize("kind", EXACT)
def test_to_floating_numbers_and_to_codes(kind):
    leaf = node(kind)
    base = leaf.w.dequantize()
    floats, rounding = lora_jax.merge({"w": leaf}, return_error=True)
    np.testing.assert_allclose(floats["w"], exact(leaf), atol=1e-6)
    assert rounding["w"] == 0
    codes, errors = lora_jax.merge({"w": leaf}, requantize=True, return_error=True)
    assert Coding.of(codes["w"]) == Coding.of(leaf.w) and codes["w"].shape == base.shape
    want = quantize_array(jnp.asarray(exact(leaf), jnp.float32), kind, -2)
    got, want = codes["w"].dequantize(), want.dequantize()
    assert (abs(got - want) > 1e-6).mean() < 1e-3  # a sum halfway between two codes
    lost = np.linalg.norm(got - exact(leaf)) / np.linalg.norm(exact(leaf) - base)
    np.testing.assert_allclose(errors["w"], lost, rtol=1e-5)


def test_int8_codes_by_hand():
    leaf = node("int8", size=0.3)
    total = exact(leaf).astype(np.float32)
    scale = np.abs(total).max(0, keepdims=True) / np.float32(127)
    got = lora_jax.merge(leaf, requantize=True)
    np.testing.assert_allclose(got.fields["scales"], scale, rtol=1e-6)
    differ = np.asarray(got.fields["codes"]) != np.round(total / scale).astype(np.int8)
    assert differ.mean() < 1e-3
    assert abs(exact(leaf) - got.dequantize()).max() < 0.51 * scale.max()


def test_an_update_below_the_steps_of_the_kind_is_lost_and_the_report_says_so():
    _, errors = lora_jax.merge({"w": node("int4", size=1e-3)}, requantize=True, return_error=True)
    assert 0.98 < errors["w"] < 1.5
    _, errors = lora_jax.merge({"w": node("int8", size=0.5)}, requantize=True, return_error=True)
    assert errors["w"] < 0.02


@pytest.mark.parametrize("kind", EXACT)
def test_quantizing_a_quantized_weight_again_changes_at_most_the_last_digit(kind):
    w = node(kind).w
    again = Coding.of(w).encode(w.dequantize())
    name = w.format.codes
    assert_same(again.fields[name], w.fields[name])
    np.testing.assert_allclose(again.dequantize(), w.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("change", ["scale", "a", "b"])
def test_what_an_adapter_does_not_change_keeps_its_codes(change):
    """Also where another rounding would choose other codes: no code here is the largest."""
    leaf = node("int8", batch=(2,))
    half = lambda c: (c // 2).astype(c.dtype) if c.dtype == jnp.int8 else c
    leaf = dataclasses.replace(leaf, w=jax.tree.map(half, leaf.w))
    part = getattr(leaf, change)
    leaf = dataclasses.replace(leaf, **{change: part.at[0].set(0)})
    got = lora_jax.merge(leaf, requantize=True)
    for name, x in got.fields.items():
        assert_same(x[0], leaf.w.fields[name][0])
        assert (x[1] != leaf.w.fields[name][1]).any()


def test_another_kind_and_the_dtype_that_the_weight_stands_for():
    leaf = node("int8", dtype=jnp.bfloat16)
    got = lora_jax.merge({"w": leaf}, requantize="nf4")["w"]
    assert (got.kind, got.axis, got.dtype) == ("nf4", -2, jnp.bfloat16)
    unrounded = dataclasses.replace(leaf, w=dataclasses.replace(leaf.w, dtype=jnp.float32))
    want = quantize_array(jnp.asarray(exact(unrounded), jnp.float32), "nf4", -2)
    assert (got.fields["codes"] != want.fields["codes"]).mean() < 1e-3
    assert lora_jax.merge(leaf).dtype == jnp.bfloat16
    wide = lora_jax.merge(leaf, jnp.float32)
    np.testing.assert_allclose(wide, exact(leaf), atol=1e-6)
    plain = dataclasses.replace(leaf, w=leaf.w.dequantize())
    assert_same(lora_jax.merge(plain, requantize=True), lora_jax.merge(plain))


def test_dora_rows_and_whole_leaves():
    leaf = node("int8", dora=True)
    np.testing.assert_allclose(lora_jax.merge(leaf), exact(leaf), rtol=1e-5, atol=1e-6)
    got = lora_jax.merge(leaf, requantize=True).dequantize()
    assert abs(got - exact(leaf)).max() < 0.51 * abs(exact(leaf)).max() / 127
    w = leaf.w
    value = normal(5, (2, OUT), jnp.float32)
    rows = TrainedRows(w, value, jnp.float32(1), rows=(3, 7), axis=0, layout=Layout("io"))
    want = np.asarray(w.dequantize()).copy()
    want[[3, 7]] = value
    assert_same(lora_jax.merge(rows), want)
    assert_same(
        lora_jax.merge(rows, requantize=True).fields["codes"],
        quantize_array(jnp.asarray(want), "int8", -2).fields["codes"],
    )
    whole = TrainedLeaf(w, normal(6, w.shape, jnp.float32), jnp.float32(1))
    assert_same(lora_jax.merge(whole), whole.value)
    got, want = lora_jax.merge(whole, requantize=True), quantize_array(whole.value, "int8", -2)
    assert_same(got.fields["codes"], want.fields["codes"])


@pytest.mark.parametrize("kind", [pytest.param("nf4", marks=pytest.mark.slow), "int4"])
def test_a_stack_goes_layer_by_layer_and_may_take_the_bases_memory(kind):
    leaf = node(kind, batch=(2, 3))
    base, rest = lora_jax.split(leaf)
    codes, errors = lora_jax.merge({"w": leaf}, requantize=True, return_error=True)
    coding, form = Coding.of(base), merge_leaf.choose_form(base, rest)
    assert form is not merge_leaf.LoopForm.WHOLE
    compiled = merge_leaf.sum_donated.lower(base, rest, target=coding, form=form).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == base.nbytes
    layer = 4 * SIZE * OUT  # one layer's sum in float32; XLA rounds it in pieces
    assert memory.temp_size_in_bytes < 4 * layer
    sums = np.zeros(2)
    for i in range(2):
        for j in range(3):
            at = lambda x, i=i, j=j: x[i : i + 1, j : j + 1]
            one = take_layer(leaf, jax.tree.map(at, leaf.w), (i, j, slice(None), slice(None)))
            made, lost, update = merge_layer(one, coding)
            sums += float(lost), float(update)
            jax.tree.map(lambda x, y, i=i, j=j: assert_same(x[i, j], y[0, 0]), codes["w"], made)
    np.testing.assert_allclose(errors["w"], np.sqrt(sums[0] / sums[1]), rtol=1e-4)
    donated = lora_jax.merge({"w": leaf}, requantize=True, donate=True)["w"]
    jax.tree.map(assert_same, donated, codes["w"])
    assert all(x.is_deleted() for x in base.fields.values())


def test_under_jit_and_leaves_without_adapters():
    params = {"adapted": node(), "plain": node().w}
    got = jax.jit(lambda params: lora_jax.merge(params, requantize=True))(params)
    want = lora_jax.merge(params, requantize=True)
    differ = got["adapted"].fields["codes"] != want["adapted"].fields["codes"]
    assert differ.mean() < 1e-3 and want["plain"] is params["plain"]
    assert not is_quantized(lora_jax.merge(params)["adapted"])


def test_refusals(monkeypatch):
    leaf = node("int8")
    with pytest.raises(ConfigError, match="kind 'nf5' is not one of"):
        lora_jax.merge({"w": leaf}, requantize="nf5")
    with pytest.raises(ConfigError, match=r"v: blocks of 128 \(int8_block\) do not divide axis -2"):
        short = LoraWeight(
            quantize_array(jnp.ones((96, 3)), "int8", -2),
            jnp.ones((96, 1)),
            jnp.ones((1, 3)),
            jnp.float32(1),
            layout=Layout("io"),
        )
        lora_jax.merge({"w": leaf, "v": short}, requantize="int8_block")
    monkeypatch.setitem(KINDS, "int8", dataclasses.replace(KINDS["int8"], encode=None))
    with pytest.raises(ConfigError, match=r"w: int8 can be read .* leave requantize out"):
        lora_jax.merge({"w": leaf}, requantize=True)
    with pytest.raises(ConfigError, match="requantize='int8' can be read from files, but not"):
        lora_jax.merge({"w": leaf}, requantize="int8")


def test_unmerge_of_codes_is_refused_and_of_floating_numbers_works():
    params = {"w": node()}
    _, adapters = lora_jax.split(params)
    back = lora_jax.unmerge(lora_jax.merge(params), adapters)
    np.testing.assert_allclose(back["w"].w, params["w"].w.dequantize(), atol=1e-6)
    with pytest.raises(MergeError, match="base weight of w: the merged weight is quantized"):
        lora_jax.unmerge(lora_jax.merge(params, requantize=True), adapters)
    assert isinstance(params["w"].w, QuantizedWeight)
