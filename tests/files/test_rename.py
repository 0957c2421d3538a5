"""Names in a file that have another prefix than the base's: one line, and the option it names."""

import ast
import json
import re

import numpy as np
import pytest

import tests.parity.loralib.test_loralib as of_loralib
import tests.parity.mlx_lm.test_mlx as of_mlx
from lora_jax import AdapterFileError, ConfigError, loralib, mlx, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files import implied_tree
from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file
from lora_jax.files.peft.wrong_names import rules_of_format
from tests.files.peft.random_adapters import BASE, equal
from tests.parity.peft import models
from tests.parity.peft.models import CASES, PLAIN

START = "base_model.model."
#: What other programs make of a name in PEFT's file.
FOREIGN = {
    "bert": lambda x: x.replace(START, f"{START}bert."),
    "more of model": lambda x: x.replace(f"{START}model.", f"{START}model.model."),
    "no model": lambda x: x.replace(f"{START}model.", START),
    "language model": lambda x: x.replace(f"{START}model.", f"{START}model.language_model."),
    "compiled": lambda x: f"_orig_mod.{x}",
    "compiled within": lambda x: x.replace(START, f"{START}_orig_mod."),
    "each layer compiled": lambda x: re.sub(r"\.(up|down|conv1)\.", r"._orig_mod.\1.", x),
    "distributed": lambda x: f"module.{x}",
    "both": lambda x: f"module._orig_mod.{x}",
    "adapter": lambda x: re.sub(
        r"(lora_[AB]|lora_embedding_[AB]|magnitude_vector|tokens_delta)", r"\1.default", x
    ),
    "bare": lambda x: x.removeprefix(START),
    "bare and adapter": lambda x: FOREIGN["adapter"](x).removeprefix(START),
}


def renamed(path, change):
    tensors, metadata = safetensors_file.read(path)
    safetensors_file.write(path, {change(name): x for name, x in tensors.items()}, metadata)


def told(error):
    """Return the rules of the one line that a file's error consists of."""
    head, line = str(error.value).splitlines()
    assert "does not fit the base" in head
    found = re.search(
        r"pass rename=(\{.*\}), or on the command line (.*) \(for train, of lora-jax convert", line
    )
    rules = ast.literal_eval(found[1])
    assert found[2] == " ".join(f"--rename {old}={new}" for old, new in rules.items())
    return rules


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("case", ["linear", "patterns", "dora", "modules_to_save", "convolutions"])
def test_a_prefix_of_every_name_is_one_line(case, foreign, tmp_path):
    folder = models.unpack(case, tmp_path)
    want = peft.load(folder, BASE, PLAIN)
    before = safetensors_file.headers(folder / peft.TENSORS).tensors.keys()
    renamed(folder / peft.TENSORS, FOREIGN[foreign])
    if before == safetensors_file.headers(folder / peft.TENSORS).tensors.keys():
        pytest.skip("the case has no such name")
    with pytest.raises(AdapterFileError) as error:
        peft.load(folder, BASE, PLAIN)
    rules = told(error)
    equal(peft.load(folder, BASE, PLAIN, rename=rules), want)


def test_not_strict_takes_what_has_no_prefix(tmp_path):
    folder = models.unpack("linear", tmp_path)
    renamed(folder / peft.TENSORS, FOREIGN["each layer compiled"])
    with pytest.raises(AdapterFileError, match=r"nothing in this file fits the base:\n\d+ names"):
        peft.load(folder, BASE, PLAIN, strict=False)
    renamed(folder / peft.TENSORS, lambda x: x.replace("_orig_mod.up", "up"))
    with pytest.warns(UserWarning, match=r"ignored .*\n\d+ names.*pass rename="):
        assert len(adapted_nodes(peft.load(folder, BASE, PLAIN, strict=False))) == 3


def test_the_patterns_of_the_configuration_know_the_files_names(tmp_path):
    """Ranks and scales by whole names, with the prefix that the file has."""
    case = "patterns"
    folder = models.unpack(case, tmp_path)
    want = peft.load(folder, BASE, PLAIN)
    config = json.loads((folder / peft.CONFIG).read_text())
    config["rank_pattern"] = {
        "bert.model.layers.1.up": 2,
        "^bert.model.layers.2.down": 5,
        "c_attn": 4,
    }
    config["alpha_pattern"] = {"down": 1.5, r"^bert\.model\.layers\.[01]\.up": 9}
    (folder / peft.CONFIG).write_text(json.dumps(config))
    renamed(folder / peft.TENSORS, FOREIGN["bert"])
    with pytest.raises(AdapterFileError) as error:
        peft.load(folder, BASE, PLAIN)
    equal(peft.load(folder, BASE, PLAIN, rename=told(error)), want)


def test_rows_of_an_embedding_that_the_configuration_names_with_the_prefix(tmp_path):
    folder = models.unpack("tokens", tmp_path)
    want = peft.load(folder, BASE, PLAIN)
    config = json.loads((folder / peft.CONFIG).read_text())
    config["trainable_token_indices"] = {"bert.model.emb": [9, 2, 13]}
    (folder / peft.CONFIG).write_text(json.dumps(config))
    renamed(folder / peft.TENSORS, FOREIGN["bert"])
    equal(peft.load(folder, BASE, PLAIN, rename={"bert": ""}), want)


def test_what_else_is_wrong_is_told_beside_the_prefix(tmp_path):
    folder = models.unpack("linear", tmp_path)
    renamed(folder / peft.TENSORS, FOREIGN["bert"])
    tensors, _ = safetensors_file.read(folder / peft.TENSORS)
    wrong = f"{START}bert.model.layers.1.up.lora_A.weight"
    tensors[wrong] = tensors[wrong][:, :2]
    tensors[f"{START}bert.model.pooler.lora_A.weight"] = np.ones((3, 6), "f4")
    safetensors_file.write(folder / peft.TENSORS, tensors)
    with pytest.raises(AdapterFileError) as error:
        peft.load(folder, BASE, PLAIN)
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 3 and sum("pass rename=" in line for line in lines) == 1
    assert any("layers.1.up.lora_A.weight: has shape (3, 2)" in line for line in lines)
    assert any("model.pooler.lora_A.weight: not in this base" in line for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.replace("layers.", "h."),  # another model
        lambda x: x.replace("up.lora", "gate.lora"),
        lambda x: x.replace("layers.1.", "layers.7."),
        lambda x: x.replace("layers.1.up", "layers.1.deep.up"),
    ],
)
def test_other_names_are_not_taken_for_a_prefix(change, tmp_path):
    folder = models.unpack("linear", tmp_path)
    renamed(folder / peft.TENSORS, change)
    with pytest.raises(AdapterFileError) as error:
        peft.load(folder, BASE, PLAIN)
    if "deep" in change("layers.1.up"):
        assert told(error) == {"deep": ""}
    else:
        assert "rename" not in str(error.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layer": ""}, "rename: 'layer' is in no name of the file"),
        ({"layers.0": "layers.1"}, "rename makes names equal"),
        ([("a", "b")], "rename must map"),
        ({"a": 3}, "rename must map"),
    ],
)
def test_rules_that_cannot_be(rules, message, tmp_path):
    with pytest.raises((ConfigError, AdapterFileError), match=message):
        peft.load(models.unpack("linear", tmp_path), BASE, PLAIN, rename=rules)


@pytest.mark.parametrize("prefix", ["language_model", "_orig_mod", "model.language_model"])
def test_mlx_and_loralib(prefix, tmp_path):
    case = of_mlx.CASES[0]
    folder, tree = of_mlx.unpack(case, tmp_path), of_mlx.base(of_mlx.PLAIN)
    want = mlx.load(folder, tree, of_mlx.PLAIN)
    renamed(folder / mlx.TENSORS, lambda x: f"{prefix}.{x}")
    with pytest.raises(AdapterFileError) as error:
        mlx.load(folder, tree, of_mlx.PLAIN)
    assert told(error) == {prefix: ""}
    equal(mlx.load(folder, tree, of_mlx.PLAIN, rename={prefix: ""}), want)

    path, recorded = tmp_path / "lora.safetensors", of_loralib.RECORDED
    path.write_bytes(recorded["saved"].tobytes())
    options = {"alpha": 4, "enabled": of_loralib.ENABLED}
    base = of_loralib.leaves(of_loralib.NAMING), of_loralib.NAMING
    want = loralib.load(path, *base, **options)
    renamed(path, lambda x: f"{prefix}.{x}")
    with pytest.raises(AdapterFileError) as error:
        loralib.load(path, *base, **options)
    assert told(error) == {prefix: ""}
    equal(loralib.load(path, *base, rename={prefix: ""}, **options), want)
    renamed(path, lambda x: x.removeprefix(f"{prefix}.h."))
    with pytest.raises(AdapterFileError) as error:
        loralib.load(path, *base, **options)
    assert told(error) == {"": "h"}


@pytest.mark.parametrize("foreign", ["compiled", "distributed", "both", "adapter", "bare"])
def test_names_that_are_not_pefts_are_known_without_a_base(foreign, tmp_path):
    folder = models.unpack("linear", tmp_path)
    want = read_factors(folder)
    renamed(folder / peft.TENSORS, FOREIGN[foreign])
    got = read_factors(folder)
    assert [one.module for one in got.factors] == [one.module for one in want.factors]
    with pytest.raises(AdapterFileError) as error:
        implied_tree.from_peft(folder)
    (line,) = str(error.value).splitlines()
    rules = ast.literal_eval(re.search(r"pass rename=(\{.*\}), or", line)[1])
    equal(implied_tree.from_peft(folder, rename=rules).adapters, _as_implied(tmp_path))


def _as_implied(folder):
    """Return what the file with its own names is, on the tree that it implies."""
    models.unpack("linear", folder / "own")
    return implied_tree.from_peft(folder / "own").adapters


@pytest.mark.parametrize("case", CASES)
def test_pefts_own_names_have_no_part_too_much(case, tmp_path):
    names = safetensors_file.headers(models.unpack(case, tmp_path) / peft.TENSORS).tensors
    assert rules_of_format(names) == {}
