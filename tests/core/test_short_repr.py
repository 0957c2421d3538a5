"""The `repr` of adapted nodes: short, without arrays, whatever the fields hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraConfig, LoraWeight, TrainedLeaf, TrainedRows

PARAMS = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3), "table": jnp.ones((9, 2))}


def init(params=PARAMS, **fields):
    fields = {"rank": 2, "alpha": 1, "targets": ["kernel"], **fields}
    return lora_jax.init(jax.random.key(0), params, LoraConfig(**fields))


def test_each_kind_of_node():
    params = init(train=["bias"], rows={"table": [8, 3]}, overrides={"table": {"rows_axis": 0}})
    assert repr(params) == (
        "{'bias': TrainedLeaf(float32[3], scale=1.0), "
        "'kernel': LoraWeight(bfloat16[4,3], rank=2, layout='io', scale=0.5), "
        "'table': TrainedRows(float32[9,2], rows=(8, 3), axis=0, layout='io', scale=1.0)}"
    )


def test_overlays():
    params = init(train=["bias"], rows={"table": [8]}, overrides={"table": {"rows_axis": 0}})
    _, adapters = lora_jax.split(params)
    assert repr(adapters) == (
        "{'bias': TrainedLeaf(overlay[3], scale=1.0), "
        "'kernel': LoraWeight(overlay[4,3], rank=2, layout='io', scale=0.5), "
        "'table': TrainedRows(overlay[1,2], rows=(8,), axis=0, layout='io', scale=1.0)}"
    )


def test_what_else_is_set():
    node = init(dora=True, dropout=0.1)["kernel"]
    assert repr(node) == (
        "LoraWeight(bfloat16[4,3], rank=2, layout='io', scale=0.5, magnitude=float32[3], "
        "dropout=0.1)"
    )
    keyed = lora_jax.with_dropout(node, jax.random.key(1))
    assert repr(keyed) == repr(node)


def test_many_rows():
    node = TrainedRows(
        None, jnp.ones((128, 2)), jnp.ones(()), rows=tuple(range(128)), axis=0, layout=Layout("io")
    )
    assert repr(node) == (
        "TrainedRows(overlay[128,2], rows=(0, 1, 2, 3, ... 124 more), axis=0, layout='io', "
        "scale=1.0)"
    )


def test_stacked_layers_have_a_scale_each():
    config = LoraConfig(rank=1, overrides={"stack": {"layout": "bio"}})
    node = lora_jax.init(jax.random.key(0), {"stack": jnp.ones((5, 4, 3))}, config)["stack"]
    want = "LoraWeight(float32[5,4,3], rank=1, layout='bio', scale=float32[5])"
    assert repr(node) == want


def test_shapes_and_tracers_have_no_values():
    want = "LoraWeight(float32[4,3], rank=2, layout='io', scale=float32[])"
    shapes = init({"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)})
    assert repr(shapes["kernel"]) == want
    seen = []
    jax.jit(lambda node: seen.append(repr(node)))(init({"kernel": jnp.ones((4, 3))})["kernel"])
    assert seen == [want]


def test_stacked_adapters_and_what_maps_over_them():
    _, adapters = lora_jax.split(init())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), adapters, adapters, adapters)["kernel"]
    assert repr(stacked) == (
        "LoraWeight(overlay[4,3], slots=3, rank=2, layout='io', scale=float32[3])"
    )
    seen = []
    jax.vmap(lambda node: seen.append(repr(node)))(stacked)
    assert seen == ["LoraWeight(overlay[4,3], rank=2, layout='io', scale=float32[])"]


def test_labels_and_masks():
    params = init(train=["bias"])
    labels = lora_jax.labels(params)
    assert repr(labels["kernel"]).startswith(
        "LoraWeight(w='freeze', a='train', b='train', scale='freeze', layout="
    )
    assert repr(labels["bias"]) == "TrainedLeaf(w='freeze', value='train', scale='freeze')"
    assert "a=True" in repr(lora_jax.mask(params)["kernel"])


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        (np.float32(0.1), "0.1"),
        (jnp.bfloat16(0.5), "0.5"),
        (2.5, "2.5"),
        (None, "None"),
        (jnp.ones((2, 3)), "float32[2,3]"),
    ],
)
def test_scales(scale, text):
    assert repr(TrainedLeaf(None, jnp.ones(3), scale)) == f"TrainedLeaf(overlay[3], scale={text})"


def test_donated_arrays_have_no_values():
    scale = jnp.float32(2) + 0
    node = TrainedLeaf(None, jnp.ones(3), scale)
    scale.delete()
    assert repr(node) == "TrainedLeaf(overlay[3], scale=float32[])"


def test_a_field_that_is_a_random_key():
    node = init()["kernel"]
    odd = dataclasses.replace(node, a="A", w=None, key=jax.random.key(0))
    assert "a='A'" in repr(odd) and "key=key<fry>[]" in repr(odd)
    assert isinstance(odd, LoraWeight)
