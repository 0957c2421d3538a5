"""Paths and the patterns that select them."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax import StructureError, TargetError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import select
from lora_jax.core.weights import is_adapted
from lora_jax.files.disk import safetensors_file

LEAVES = dict.fromkeys(
    [
        "block_0/attn/query/kernel",
        "block_0/attn/query/bias",
        "block_1/attn/query/kernel",
        "block_1/mlp/up/kernel",
        "head/kernel",
    ],
    0,
)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        (r"block_\d/attn/.*", [0, 1, 2]),
        ("head/kernel", [4]),
        (["query/kernel"], [0, 2]),
        (["kernel"], [0, 2, 3, 4]),
        (["query"], [0, 1, 2]),
        (["block_1"], [2, 3]),
        (["attn/query/kernel", "head"], [0, 2, 4]),
        (lambda path, leaf: path.startswith("head"), [4]),
    ],
)
def test_select(pattern, chosen):
    assert sorted(select("targets", pattern, LEAVES)) == sorted(list(LEAVES)[i] for i in chosen)


def test_suffixes_are_whole_segments():
    with pytest.raises(TargetError):
        select("targets", ["uery/kernel"], LEAVES)


def test_a_regex_matches_the_whole_path():
    with pytest.raises(TargetError, match="block_0/attn/query/kernel"):
        select("targets", "block_0/attn/query", LEAVES)


@pytest.mark.parametrize("pattern", ["attn", "query", "head", "query/kernel"])
def test_a_string_that_would_be_right_in_a_list(pattern):
    with pytest.raises(TargetError, match=r"A string is a regex") as error:
        select("targets", pattern, LEAVES)
    assert f"write targets=[{pattern!r}]" in str(error.value)
    assert select("targets", [pattern], LEAVES)


def test_every_unmatched_entry_is_named_with_the_nearest_paths():
    with pytest.raises(TargetError) as error:
        select("targets", ["qeury/kernel", "head/kernel", "hed"], LEAVES)
    first, second = str(error.value).splitlines()
    assert "'qeury/kernel'" in first and "block_0/attn/query/kernel" in first
    assert "'hed'" in second and "head/kernel" in second


def test_a_callable_that_selects_nothing():
    with pytest.raises(TargetError, match="none of 5"):
        select("targets", lambda path, leaf: False, LEAVES)


def test_two_leaves_of_one_path():
    with pytest.raises(StructureError, match="a/b"):
        flatten_with_paths({"a/b": 1, "a": {"b": 2}})


# --- Fields and boxes named `value` ---------------------------------------------------------------


class Tuple(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    query: Any
    key: Any
    value: Any
    out: Any


@flax.struct.dataclass
class Struct:
    query: Any
    key: Any
    value: Any
    out: Any


class Module(eqx.Module):
    query: Any
    key: Any
    value: Any
    out: Any


class Only(NamedTuple):
    value: Any


CLASSES = [Tuple, Data, Struct, Module]
FIELDS = ("query", "key", "value", "out")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_field_called_value_keeps_its_name(cls):
    tree = {"attn": cls(*(jnp.full((4, 4), float(i)) for i in range(4)))}
    leaves, _ = flatten_with_paths(tree)
    assert list(leaves) == [f"attn/{name}" for name in FIELDS]
    assert float(leaves["attn/value"][0, 0]) == 2

    def model(params, x):
        h = params["attn"]
        return (x @ h.query + x @ h.key + x @ h.value) @ h.out

    x = jnp.ones((2, 4))
    for targets, want in [
        (["attn"], FIELDS),
        (["query", "value"], ("query", "value")),
        ([".*/value"][0], ("value",)),
    ]:
        config = lora_jax.LoraConfig(rank=1, targets=targets)
        adapted = lora_jax.init(jax.random.key(0), tree, config, model, x)
        assert [name for name in FIELDS if is_adapted(getattr(adapted["attn"], name))] == [*want]
        moved = jax.tree.map(lambda w: w + 0.25, adapted)
        got = lora_jax.lora(model, on_dense="error")(moved, x)
        np.testing.assert_allclose(got, model(lora_jax.merge(moved), x), rtol=1e-5)


def test_the_only_field_of_another_class_keeps_its_name():
    assert [*flatten_with_paths({"scale": Only(1.0), "eqx": [Only(2.0)]})[0]] == [
        "eqx/0/value",
        "scale/value",
    ]


def test_boxes_of_flax_have_no_name_for_what_they_hold():
    w = jnp.ones((4, 4))
    box = nn.Partitioned(w, names=("in", "out"))
    logical = nn.LogicallyPartitioned(w, names=("in", "out"))
    tree = {"a": box, "b": {"c": logical}, "d": nnx.Param(w), "e": nnx.Param({"f": w})}
    tree |= {"value": w, "g": Tuple(w, nn.Partitioned(w, names=(None, None)), w, w)}
    paths = ["a", "b/c", "d", "e/value/f", "g/query", "g/key", "g/value", "g/out", "value"]
    assert [*flatten_with_paths(tree)[0]] == paths
    assert [*flatten_with_paths(nnx.Param(w))[0]] == [""]


def test_every_part_of_an_nnx_model_has_one_path():
    class Attention(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones((4, 4)))
            self.heads = nnx.List([nnx.Param(jnp.ones(4)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))])

    model = Attention()
    want = ["heads/0", "heads/1/bias", "heads/1/kernel", "value"]
    for tree in (model, nnx.state(model)):
        assert sorted(flatten_with_paths(tree)[0]) == want


def test_a_file_with_the_shorter_path_loads(tmp_path):
    """Older releases wrote `attn` for `attn/value`."""
    tree = {"attn": Tuple(*(jnp.full((4, 4), float(i)) for i in range(4)))}
    params = lora_jax.init(jax.random.key(0), tree, lora_jax.LoraConfig(rank=1, targets=["value"]))
    lora_jax.save(tmp_path / "a", params)
    tensors, header = safetensors_file.read(tmp_path / "a")
    tensors = {name.replace("attn/value", "attn"): x for name, x in tensors.items()}
    header = {name: text.replace("attn/value", "attn") for name, text in header.items()}
    safetensors_file.write(tmp_path / "a", tensors, header)
    adapters = lora_jax.load(tmp_path / "a", tree)
    np.testing.assert_array_equal(adapters["attn"].value.a, params["attn"].value.a)
    with pytest.raises(lora_jax.AdapterFileError, match="attn/value: other values"):
        lora_jax.load(tmp_path / "a", {"attn": tree["attn"]._replace(value=jnp.zeros((4, 4)))})
