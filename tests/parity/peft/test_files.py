"""Files that peft 0.21.2 saved, read onto JAX trees and written again, against peft's results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import to_torch
from tests.parity.peft import models
from tests.parity.peft.models import BASE, CASES, NAMINGS, PLAIN, RECORDED

IDS = jnp.asarray(RECORDED["ids"])
TREES = {which: models.base(which) for which in NAMINGS}
APPLY = jax.jit(models.apply)


@pytest.fixture
def folder(tmp_path):
    return lambda case: models.unpack(case, tmp_path / case)


def tensors_in(directory):
    return safetensors_file.read(directory / peft.TENSORS)[0]


def merged(which, adapters):
    """Return the tree with the weights that the adapters mean."""
    nodes = adapted_nodes(adapters)
    assert nodes
    tree = {path: np.asarray(x) for path, x in TREES[which].items()}
    return tree | {path: models.meaning(node, tree[path]) for path, node in nodes.items()}


def torch_weights(which, adapters):
    return to_torch(NAMINGS[which], merged(which, adapters))


def test_the_model_is_torchs():
    np.testing.assert_allclose(APPLY(TREES["plain"], IDS), RECORDED["y"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_pefts(case, folder):
    base = TREES["plain"]
    adapters = peft.load(folder(case), base, PLAIN)
    y = APPLY(merged("plain", adapters), IDS)
    np.testing.assert_allclose(y, RECORDED[f"{case}/y"], atol=2e-6)
    assert np.abs(y - RECORDED["y"]).max() > 1e-2  # the adapter does something


def test_adapted_outputs_equal_pefts(folder):
    base = TREES["plain"]
    for case in ("patterns", "dora"):
        params = lora_jax.join(base, peft.load(folder(case), base, PLAIN))
        y = jax.jit(lora_jax.lora(models.apply))(params, IDS)
        np.testing.assert_allclose(y, RECORDED[f"{case}/y"], atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "lora_bias"])
def test_what_was_read_is_written_again(case, folder, tmp_path):
    """The same tensors, and a configuration that means the same for every module."""
    base, given = TREES["plain"], peft.read_config(folder(case))
    adapters = peft.load(folder(case), base, PLAIN)
    want = tensors_in(folder(case))
    for config in (given, None):
        peft.save(tmp_path / "again", adapters, PLAIN, base=base, config=config)
        got = tensors_in(tmp_path / "again")
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype
            np.testing.assert_array_equal(got[name], want[name])
        read = peft.read_config(tmp_path / "again")
        for module in (name.removesuffix(".weight") for name in BASE if name.endswith("weight")):
            if read.targets(module):
                assert read.rank(module) == given.rank(module)
                assert np.float32(read.scale(module)) == np.float32(given.scale(module))
        if config is not None:
            equal = {f.name for f in dataclasses.fields(given)} - {"modules_to_save"}
            equal -= {"target_modules", "exclude_modules", "trainable_token_indices"}
            for name in equal - ({"fan_in_fan_out"} if case in ("patterns",) else set()):
                assert getattr(read, name) == getattr(given, name), name
    header = safetensors_file.headers(tmp_path / "again" / peft.TENSORS)
    assert header.metadata == {"format": "pt"}


def test_a_written_lora_bias_is_a_bias(folder, tmp_path):
    base = TREES["plain"]
    adapters = peft.load(folder("lora_bias"), base, PLAIN)
    peft.save(tmp_path / "again", adapters, PLAIN, base=base)
    again = peft.load(tmp_path / "again", base, PLAIN)
    assert peft.read_config(tmp_path / "again").bias == "lora_only"
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.parametrize("which", [which for which in NAMINGS if which != "plain"])
@pytest.mark.parametrize("case", CASES)
def test_other_trees_mean_the_same(which, case, folder, tmp_path):
    """Stacked, split and joined leaves: the merged weights are the plain tree's, back and forth."""
    adapters = peft.load(folder(case), TREES[which], NAMINGS[which])
    want = torch_weights("plain", peft.load(folder(case), TREES["plain"], PLAIN))
    got = torch_weights(which, adapters)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)
    peft.save(tmp_path / "again", adapters, NAMINGS[which], base=TREES[which])
    if case != "lora_bias":
        written, read = tensors_in(tmp_path / "again"), tensors_in(folder(case))
        assert written.keys() == read.keys()
    again = torch_weights("plain", peft.load(tmp_path / "again", TREES["plain"], PLAIN))
    for name in want:
        np.testing.assert_allclose(again[name], want[name], atol=1e-6, err_msg=name)
