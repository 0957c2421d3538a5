"""Paths and the patterns that select them."""

import pytest

from lora_jax import StructureError, TargetError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import select

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
