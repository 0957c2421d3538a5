"""PiSSA and OLoRA adapters that were saved unconverted, against what PEFT computes with them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterFileError, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import to_torch, to_tree
from tests.files.peft.random_adapters import SHAPES
from tests.parity.peft import models
from tests.parity.peft.models import NAMINGS, PLAIN

RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "changed_base.npz")
CASES = sorted({name.split("/")[0] for name in RECORDED.files})
DETERMINED = [case for case in CASES if "niter" not in case]
APPLY = jax.jit(models.apply)


def unpack(case, folder, change=lambda tensors: None, **fields):
    config = json.loads(RECORDED[f"{case}/{peft.CONFIG}"].tobytes()) | fields
    (folder / peft.CONFIG).write_text(json.dumps(config))
    tensors, _ = safetensors_file.decode(RECORDED[f"{case}/{peft.TENSORS}"].tobytes(), case)
    change(tensors)
    safetensors_file.write(folder / peft.TENSORS, tensors)
    return folder


def outputs(which, tree, adapters):
    tree = {path: np.asarray(x) for path, x in tree.items()}
    for path, node in adapted_nodes(adapters).items():
        tree[path] = models.meaning(node, tree[path])
    weights = to_torch(NAMINGS[which], tree)
    plain = to_tree(PLAIN, weights, SHAPES)
    return np.asarray(APPLY(plain, models.RECORDED["ids"]))


def residual(case):
    """Return the tree that the initialization left."""
    weights = to_torch(PLAIN, models.base("plain"))
    start = f"{case}/residual/"
    changed = {n.removeprefix(start): RECORDED[n] for n in RECORDED.files if n.startswith(start)}
    assert changed.keys() <= weights.keys()
    return to_tree(PLAIN, weights | changed, SHAPES)


@pytest.mark.parametrize("which", NAMINGS)
@pytest.mark.parametrize("case", DETERMINED)
def test_outputs_equal_pefts(case, which, tmp_path):
    base, want = models.base(which), RECORDED[f"{case}/y"]
    folder = unpack(case, tmp_path)
    adapters = peft.load(folder, base, NAMINGS[which])
    np.testing.assert_allclose(outputs(which, base, adapters), want, atol=4e-6)
    as_it_is = peft.load(folder, base, NAMINGS[which], residual=True)
    assert np.abs(outputs(which, base, as_it_is) - want).max() > 1e-2
    nodes = adapted_nodes(adapters).items()
    assert all(node.dropout == 0 for _, node in nodes if hasattr(node, "dropout"))


@pytest.mark.parametrize("case", CASES)
def test_on_the_residual_the_factors_stand_as_they_are(case, tmp_path):
    folder, base = unpack(case, tmp_path), residual(case)
    adapters = peft.load(folder, base, PLAIN, residual=True)
    np.testing.assert_allclose(outputs("plain", base, adapters), RECORDED[f"{case}/y"], atol=4e-6)
    stored, _ = safetensors_file.read(folder / peft.TENSORS)
    name = next(name for name in stored if name.endswith("0.up.lora_A.weight") or "c_attn" in name)
    path = name.removeprefix("base_model.model.").partition(".lora")[0].replace(".", "/")
    np.testing.assert_array_equal(adapters[f"{path}/kernel"].a.T, stored[name])


@pytest.mark.parametrize("case", DETERMINED)
def test_what_is_written_is_for_the_original_base(case, tmp_path):
    base, given = models.base("plain"), peft.read_config(unpack(case, tmp_path))
    adapters = peft.load(tmp_path, base, PLAIN)
    for config in (given, None):
        peft.save(tmp_path / "again", adapters, PLAIN, base=base, config=config)
        written = peft.read_config(tmp_path / "again")
        assert written.init_lora_weights is True and not written.changes_base
        again = peft.load(tmp_path / "again", base, PLAIN)
        np.testing.assert_allclose(outputs("plain", base, again), RECORDED[f"{case}/y"], atol=4e-6)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_recomputed_is_refused(start, strict, tmp_path):
    folder = unpack("pissa", tmp_path, init_lora_weights=start)
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, models.base("plain"), PLAIN, strict=strict)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{folder / peft.CONFIG}: init_lora_weights is '{start}'")
    assert "residual=True" in line and "path_initial_model_for_weight_conversion" in line


@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_shapes_alone_are_not_enough(case, tmp_path):
    with pytest.raises(AdapterFileError, match="recomputed from the base, which must have values"):
        peft.load(unpack(case, tmp_path), SHAPES, PLAIN, strict=False)


@pytest.mark.parametrize(
    ("case", "weight", "message"),
    [
        ("pissa", np.eye(6, 10), "singular values 3 and 4 are equal"),
        ("olora", np.ones((6, 10)), "first 3 columns are linearly dependent"),
    ],
)
def test_decompositions_that_are_not_unique_are_refused(case, weight, message, tmp_path):
    base = models.base("plain")
    base["model/layers/1/up/kernel"] = jnp.asarray(weight, "float32")
    with pytest.raises(AdapterFileError, match=rf"layers.1.up.weight: its {message}"):
        peft.load(unpack(case, tmp_path), base, PLAIN)
    with pytest.warns(UserWarning, match=message):
        adapters = peft.load(tmp_path, base, PLAIN, strict=False)
    assert adapters["model/layers/1/up/kernel"] is None


def test_weights_of_low_rank_are_determined(tmp_path):
    """Singular triplets of zeros subtract nothing, whichever they are."""
    base = models.base("plain")
    rng = np.random.default_rng(0)
    low = rng.normal(size=(6, 1)) @ rng.normal(size=(1, 10))
    base["model/layers/1/up/kernel"] = jnp.asarray(low, "float32")
    adapters = peft.load(unpack("pissa", tmp_path), base, PLAIN)
    node, stored = (
        adapters["model/layers/1/up/kernel"],
        safetensors_file.read(tmp_path / peft.TENSORS)[0],
    )
    a, b = (stored[f"base_model.model.model.layers.1.up.lora_{x}.weight"] for x in "AB")
    want = 4 / 3 * (b.astype("f8") @ a).T  # the whole weight was subtracted
    np.testing.assert_allclose(models.meaning(node, low), want, atol=1e-5)
