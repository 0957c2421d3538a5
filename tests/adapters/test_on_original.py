"""`on_original`: what was trained on a changed base, on the base as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig, StructureError
from lora_jax.core.layout import Layout
from tests.programs.weights_of_each_kind import (
    INPUTS,
    PARAMS,
    RANK,
    ROWS,
    initialized,
    normal,
    program,
)

STACKED = next(row.fn for row in ROWS if row.name == "stacked")
pytestmark = pytest.mark.usefixtures("quick_compile")


def trained(adapted, scale=None):
    """An overlay that has moved: factors and, if it is given, the scale."""
    _, adapters = lora_jax.split(adapted)

    def one(node):
        moved = {name: getattr(node, name) for name in ("a", "b")}
        moved = {k: x + 0.1 * normal(4, *x.shape).astype(x.dtype) for k, x in moved.items()}
        return dataclasses.replace(node, **moved)

    is_node = lambda x: isinstance(x, lora_jax.LoraWeight)
    moved = jax.tree.map(one, adapters, is_leaf=is_node)
    return moved if scale is None else lora_jax.set_scale(moved, scale)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("pissa", None),
        ("olora", 0.7),
        *(
            pytest.param(name, scale, marks=pytest.mark.slow)
            for name, scale in [("pissa", 0.7), ("pissa", 0.0), ("olora", None), ("olora", 0.0)]
        ),
    ],
)
def test_merges_to_the_same_weights(name, scale):
    adapted = initialized(name)
    changed, _ = lora_jax.split(adapted)
    after = trained(adapted, scale)
    overlay = lora_jax.on_original(adapted, after, PARAMS)
    got = lora_jax.merge(lora_jax.join(PARAMS, overlay), jnp.float32)
    want = lora_jax.merge(lora_jax.join(changed, after), jnp.float32)
    for row in ROWS:
        assert overlay[row.name].rank == 2 * RANK and overlay[row.name].w is None
        # A base in bfloat16 lost digits when it was changed.
        atol = 2e-2 if row.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(got[row.name], want[row.name], atol=atol, err_msg=row.name)


@pytest.mark.parametrize(
    "fields", [{"dora": True}, {"layers": [0, 2]}, {"dora": True, "layers": [1]}]
)
def test_magnitudes_and_layers_come_along(fields):
    params, x = {"w": PARAMS["stacked"]}, INPUTS["stacked"]
    config = LoraConfig(rank=2, alpha=3, init="pissa", **fields)
    adapted = lora_jax.init(jax.random.key(0), params, config, lambda p, x: STACKED(p["w"], x), x)
    changed, after = lora_jax.split(adapted)
    on = np.asarray(after["w"].scale != 0)
    after = jax.tree.map(lambda x: x * 1.1, after)
    overlay = lora_jax.on_original(adapted, after, params)
    np.testing.assert_array_equal(overlay["w"].scale, on.astype(np.float32))
    got = lora_jax.merge(lora_jax.join(params, overlay))["w"]
    np.testing.assert_allclose(got, lora_jax.merge(lora_jax.join(changed, after))["w"], atol=1e-5)
    np.testing.assert_array_equal(got[~on], params["w"][~on])
    assert np.abs(got[on] - params["w"][on]).max() > 0.01


def test_overlays_and_joined_trees_convert_alike_and_run():
    adapted = initialized("pissa")
    changed, adapters = lora_jax.split(adapted)
    after = trained(adapted)
    overlay = lora_jax.on_original(adapters, lora_jax.join(changed, after), PARAMS)
    same = lora_jax.on_original(adapted, after, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, overlay, same)
    apply = lora_jax.lora(program, on_dense="error")
    got = apply(lora_jax.join(PARAMS, overlay), INPUTS)
    want = apply(lora_jax.join(changed, after), INPUTS)
    for row in (row for row in ROWS if row.dtype == jnp.float32):
        np.testing.assert_allclose(got[row.name], want[row.name], atol=2e-5)
    off = apply(lora_jax.disable(lora_jax.join(PARAMS, overlay)), INPUTS)
    np.testing.assert_array_equal(off["linear"], program(PARAMS, INPUTS)["linear"])


def test_before_training_it_is_nothing():
    overlay = lora_jax.on_original(initialized("pissa"), initialized("pissa"), PARAMS)
    merged = lora_jax.merge(lora_jax.join(PARAMS, overlay))
    for row in ROWS:
        np.testing.assert_allclose(merged[row.name], PARAMS[row.name], atol=1e-5)


def test_the_changed_base_is_refused_by_files_and_the_original_accepted(tmp_path):
    adapted = initialized("pissa")
    after = trained(adapted)
    base, _ = lora_jax.split(adapted)
    lora_jax.save(tmp_path / "changed", after, base=base)
    with pytest.raises(lora_jax.AdapterFileError, match=r"attention.*other values"):
        lora_jax.load(tmp_path / "changed", PARAMS)
    jax.tree.map(np.testing.assert_array_equal, lora_jax.load(tmp_path / "changed", base), after)
    overlay = lora_jax.on_original(adapted, after, PARAMS)
    lora_jax.save(tmp_path / "converted", overlay, base=PARAMS)
    loaded = lora_jax.load(tmp_path / "converted", PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, overlay)


def test_a_base_left_alone_keeps_the_factors_and_leaves_trained_whole():
    params = {"w": PARAMS["linear"], "bias": jnp.zeros(3)}
    config = LoraConfig(rank=2, train=["bias"], dropout=0.1)
    adapted = lora_jax.init(jax.random.key(0), params, config)
    overlay = lora_jax.on_original(adapted, adapted, params)
    _, adapters = lora_jax.split(adapted)
    assert jax.tree.structure(overlay) == jax.tree.structure(adapters)
    assert overlay["w"].a is adapters["w"].a and overlay["w"].dropout == 0.1
    assert overlay["bias"].value is adapters["bias"].value and overlay["bias"].w is None


def test_dropout_is_off_for_what_must_not_be_dropped():
    params = {"w": PARAMS["linear"]}
    config = LoraConfig(rank=2, init="pissa", dropout=0.1)
    adapted = lora_jax.init(jax.random.key(0), params, config)
    on = lora_jax.with_dropout(adapted, jax.random.key(1))
    node = lora_jax.on_original(adapted, on, params)["w"]
    assert node.dropout == 0 and node.key is None


def test_of_loftq_to_what_its_initialization_lost():
    adapted = initialized("loftq")
    changed, _ = lora_jax.split(adapted)
    after = trained(adapted)
    overlay = lora_jax.on_original(adapted, after, PARAMS)
    got, want, first = (
        np.asarray(lora_jax.merge(tree)["linear"])
        for tree in (lora_jax.join(PARAMS, overlay), lora_jax.join(changed, after), adapted)
    )
    lost = np.asarray(PARAMS["linear"]) - first
    np.testing.assert_allclose(got - lost, want, atol=1e-5)


def test_shapes_and_jit():
    adapted = initialized("pissa")
    after = trained(adapted)
    shapes = jax.eval_shape(lora_jax.on_original, adapted, after, PARAMS)
    real = jax.jit(lora_jax.on_original)(adapted, after, PARAMS)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, real)


# --- refusals -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_all_listed():
    params = {"w": PARAMS["linear"], "v": PARAMS["linear"], "bias": jnp.zeros(3)}

    def made(**fields):
        return lora_jax.init(jax.random.key(0), params, LoraConfig(init="pissa", **fields))

    before = made(rank=2, targets=["w"], train=["bias"])
    after = made(rank=3, targets=["w", "v"])
    with pytest.raises(StructureError) as caught:
        lora_jax.on_original(before, after, params)
    message = str(caught.value)
    assert "bias: only in start" in message and "v: only in trained" in message
    assert "w: start has" in message and "(24, 2)" in message and "(24, 3)" in message
    other = {"w": jnp.zeros((5, 4)), "v": params["v"]}
    with pytest.raises(StructureError, match=r"w: a is \(24, 3\), the base \(5, 4\) needs"):
        lora_jax.on_original(after, after, other)
    with pytest.raises(StructureError, match="v: not in the base"):
        lora_jax.on_original(after, after, {"w": params["w"]})
    with pytest.raises(StructureError, match="w: the base is adapted itself"):
        lora_jax.on_original(after, after, after)
    with pytest.raises(StructureError, match="no adapters"):
        lora_jax.on_original(params, params, params)


def test_scales_that_overflow_a_narrow_dtype_stay_scales():
    base = {"w": jnp.zeros((4, 3), jnp.float16)}
    node = lambda b, w: lora_jax.LoraWeight(
        w,
        jnp.full((4, 1), 1e-3, jnp.float16),
        jnp.full((1, 3), b, jnp.float16),
        jnp.float32(16.0),
        layout=Layout("io"),
    )
    start = {"w": node(1e4, jnp.ones((4, 3), jnp.float16))}
    (got,) = lora_jax.on_original(start, {"w": node(3e4, None)}, base).values()
    update = np.float64(got.scale) * (np.float64(got.a) @ np.float64(got.b))
    want = 16.0 * np.float64(np.float16(1e-3)) * (3e4 - 1e4)
    np.testing.assert_allclose(update, np.full((4, 3), want), rtol=1e-3)
