"""Adapters of models with a resized vocabulary, against the weights that PEFT merges."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming, to_torch
from tests.parity.peft.models import meaning

RECORDED = np.load(pathlib.Path(__file__).parent / "vocabulary.npz")
CASES = sorted({name.split("/")[0] for name in RECORDED.files})
NAMING = Naming(
    (
        Entry("model.embed_tokens.weight", "embed", "embedding"),
        Entry("lm_head.weight", "head", "linear"),
        Entry("model.layers.0.self_attn.q_proj.weight", "q", "linear"),
    )
)


def tensors(case, kind):
    start = f"{case}/{kind}/"
    return {n.removeprefix(start): RECORDED[n] for n in RECORDED.files if n.startswith(start)}


def tied(case):
    return "tied" in case


def base(case):
    """Return the tree; a tied head has no leaf."""
    names = {entry.path: entry.torch for entry in NAMING.entries}
    if tied(case):
        del names["head"]
    values = {path: tensors(case, "base")[name] for path, name in names.items()}
    return {path: jnp.asarray(x if path == "embed" else x.T) for path, x in values.items()}


def unpack(case, folder):
    for file in (peft.CONFIG, peft.TENSORS):
        (folder / file).write_bytes(RECORDED[f"{case}/{file}"].tobytes())
    return folder


def merged(tree, adapters):
    tree = {path: np.asarray(x) for path, x in tree.items()}
    for path, node in adapted_nodes(adapters).items():
        tree[path] = meaning(node, tree[path])
    return to_torch(NAMING, tree)


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_pefts(case, tmp_path):
    adapters = peft.load(unpack(case, tmp_path), base(case), NAMING)
    got, want = merged(base(case), adapters), tensors(case, "merged")
    assert got.keys() == want.keys() - ({"lm_head.weight"} if tied(case) else set())
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], atol=1e-6, err_msg=name)
    if tied(case):
        both = got["model.embed_tokens.weight"], want["lm_head.weight"]
        np.testing.assert_allclose(*both, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_base_that_was_not_resized(case, tmp_path):
    """One line for the vocabulary, however many tensors have its size."""
    small = base(case)
    small["embed"] = small["embed"][:11]
    if not tied(case):
        small["head"] = small["head"][:, :11]
    with pytest.raises(AdapterFileError) as caught:
        peft.load(unpack(case, tmp_path), small, NAMING)
    _, *lines = str(caught.value).splitlines()
    (line,) = [line for line in lines if "the adapter's model has 13 tokens, this base 11" in line]
    assert "models.resize_vocabulary" in line and "model.embed_tokens" in line
    assert len(lines) == (2 if "rows" in case else 1)  # rows of the base that do not exist


def edited(case, folder, change):
    unpack(case, folder)
    found, metadata = safetensors_file.read(folder / peft.TENSORS)
    change(found)
    safetensors_file.write(folder / peft.TENSORS, found, metadata)
    return folder


def test_two_trained_copies_that_differ(tmp_path):
    name = "base_model.model.lm_head.modules_to_save.weight"
    folder = edited("both saved", tmp_path, lambda found: found.update({name: found[name] + 1}))
    with pytest.raises(AdapterFileError, match=r"lm_head.*differs from the file's other copy"):
        peft.load(folder, base("both saved"), NAMING)


def test_new_rows_with_other_values(tmp_path):
    """PEFT puts the file's copy into the base; here the base is the user's, who is told."""
    tree = base("embedding adapted")
    tree["embed"] = tree["embed"].at[11:].set(0)
    with pytest.raises(AdapterFileError, match=r"differs from this base's in rows \[11, 12\]; the"):
        peft.load(unpack("embedding adapted", tmp_path), tree, NAMING)


def test_the_trained_copy_alone(tmp_path):
    folder = edited("both saved", tmp_path, lambda x: x.pop("base_model.model.lm_head.weight"))
    got = merged(base("both saved"), peft.load(folder, base("both saved"), NAMING))
    want = tensors("both saved", "merged")["lm_head.weight"]
    np.testing.assert_array_equal(got["lm_head.weight"], want)


def test_modules_of_the_base_that_have_pefts_names(tmp_path):
    """A module that is itself called "modules_to_save" is what the base says."""
    rows = [Entry("x.modules_to_save.weight", "x", "linear"), Entry("up.weight", "up", "linear")]
    tree = {"x": jnp.zeros((2, 3)), "up": jnp.zeros((2, 3))}
    config = lora_jax.LoraConfig(rank=1, targets=["up"], train=["x"])
    adapters = lora_jax.split(lora_jax.init(jax.random.key(0), tree, config))[1]
    peft.save(tmp_path, adapters, Naming(rows), base=tree)
    assert adapted_nodes(peft.load(tmp_path, tree, Naming(rows))).keys() == {"x", "up"}
