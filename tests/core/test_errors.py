"""Errors of many paths: one line for each kind."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core.errors import grouped

KEY = jax.random.key(0)


def tree(n):
    return {f"block_{i}": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)} for i in range(n)}


def test_a_few_problems_keep_their_lines():
    lines = ["a: is wrong", "b: is wrong", "c: is wrong"]
    assert grouped(lines).splitlines() == lines


def test_kinds_stay_apart_and_keep_their_order():
    lines = [f"{name}: {what}" for name in "abcd" for what in ("is odd", "is even")]
    start = "4 keys (a, b, c and 1 more)"
    assert grouped([*lines, "e: is both"], "keys").splitlines() == [
        f"{start}: is odd",
        f"{start}: is even",
        "e: is both",
    ]


def test_lines_without_a_path_stay_as_they_are():
    assert grouped(list("abcdef")).splitlines() == list("abcdef")


def test_entries_of_one_field_keep_their_lines():
    lines = [f"layers: {i} selects no target" for i in range(5)]
    assert grouped(lines).splitlines() == lines


def test_ranks_above_every_weight_are_one_line():
    with pytest.raises(lora_jax.TargetError) as error:
        lora_jax.init(KEY, tree(12), lora_jax.LoraConfig(rank=100_000))
    (line,) = str(error.value).splitlines()
    named = "block_0/kernel, block_1/kernel, block_10/kernel and 9 more"
    assert line.startswith(f"12 weights ({named}): for the first, ")
    assert "rank 100000 is above what the weight (4, 3) can hold, 3" in line


def test_adapters_of_another_base_are_one_line(tmp_path):
    params = lora_jax.init(KEY, tree(12), lora_jax.LoraConfig(rank=1))
    base, adapters = lora_jax.split(params)
    with pytest.raises(lora_jax.StructureError) as error:
        lora_jax.join({"model": base}, adapters)
    assert len(str(error.value).splitlines()) == 2  # a title, and one line
    lora_jax.save(tmp_path / "a.safetensors", params)
    with pytest.raises(lora_jax.AdapterFileError) as error:
        lora_jax.load(tmp_path / "a.safetensors", {"model": base})
    assert len(str(error.value).splitlines()) == 2
