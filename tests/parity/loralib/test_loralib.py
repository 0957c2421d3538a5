"""An adapter that loralib saved, against the weights that loralib merges."""

import pathlib

import numpy as np
import pytest

from lora_jax import AdapterFileError, ConfigError, loralib
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming, to_torch, to_tree
from tests.parity.peft.models import meaning

RECORDED = np.load(pathlib.Path(__file__).parent / "loralib.npz")
BASE = {name[5:]: RECORDED[name] for name in RECORDED.files if name.startswith("base/")}
ENABLED = {"c_attn": [True, False, True], "h.qkv": [True, True, True]}
NAMING = Naming(
    (
        Entry("h.emb.weight", "h/emb/embedding", "embedding"),
        Entry("h.cnn.weight", "h/cnn/kernel", "conv"),
        Entry("h.c_attn.weight", "h/c_attn/kernel", "conv1d"),
        Entry("h.{m}.weight", "h/{m}/kernel", "linear"),
        Entry("h.{m}.bias", "h/{m}/bias"),
    )
)
SPLIT = Naming(
    (
        Entry("h.qkv.weight", ("h/q/kernel", "h/k/kernel", "h/v/kernel"), "linear"),
        *NAMING.entries,
    )
)


def leaves(which):
    found = {}
    for name, x in BASE.items():
        _, module, leaf = name.split(".")
        if which is SPLIT and name == "h.qkv.weight":
            found |= {f"h/{part}/kernel": np.empty((6, 3), "f4") for part in "qkv"}
        elif leaf == "weight" and module != "emb":
            shape = {"c_attn": x.shape, "cnn": (3, 3, 6, 5)}.get(module, x.shape[::-1])
            found[f"h/{module}/kernel"] = np.empty(shape, "f4")
        else:
            found[f"h/{module}/{'embedding' if module == 'emb' else leaf}"] = x
    return to_tree(which, BASE, found)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(RECORDED["saved"].tobytes())
    return path


@pytest.mark.parametrize("naming", [NAMING, SPLIT], ids=["fused", "split"])
def test_merged_weights_equal_loralibs(naming, file):
    base = leaves(naming)
    adapters = loralib.load(file, base, naming, alpha=int(RECORDED["alpha"]), enabled=ENABLED)
    nodes = adapted_nodes(adapters)
    tree = {path: np.asarray(x) for path, x in base.items()}
    tree |= {path: meaning(node, tree[path]) for path, node in nodes.items()}
    merged = to_torch(naming, tree)
    for name, base_value in BASE.items():
        np.testing.assert_allclose(merged[name], RECORDED[f"merged/{name}"], atol=1e-6)
        assert not np.allclose(merged[name], base_value, atol=1e-3)
    if naming is NAMING:
        assert nodes["h/c_attn/kernel"].rank == 4 and nodes["h/qkv/kernel"].rank == 6


def test_a_convolution_under_loralibs_own_names(file):
    """loralib keeps the weight and the bias in a submodule."""
    own = {"h.cnn.weight": "h.cnn.conv.weight", "h.cnn.bias": "h.cnn.conv.bias"}
    rows = [
        Entry(new, f"h/cnn/{leaf}", kind)
        for new, leaf, kind in zip(own.values(), ("kernel", "bias"), ("conv", ""), strict=True)
    ]
    tree = {"h/cnn/kernel": np.zeros((3, 3, 6, 5), "f4"), "h/cnn/bias": np.zeros(5, "f4")}
    tensors, _ = safetensors_file.read(file)
    safetensors_file.write(file, {name: x for name, x in tensors.items() if "cnn" in name})
    nodes = adapted_nodes(loralib.load(file, tree, Naming(tuple(rows)), alpha=4))
    kernel, bias = nodes["h/cnn/kernel"], nodes["h/cnn/bias"]
    assert kernel.a.shape == (3, 3, 6, 18) and float(kernel.scale) == 2
    update = RECORDED["merged/h.cnn.weight"] - BASE["h.cnn.weight"]
    np.testing.assert_allclose(
        meaning(kernel, tree["h/cnn/kernel"]), update.transpose(2, 3, 1, 0), atol=1e-5
    )
    np.testing.assert_array_equal(bias.value, RECORDED["merged/h.cnn.bias"])


@pytest.mark.parametrize("shape", [(3, 3, 3, 10), (3, 1, 6, 15), (3, 6, 15), (3, 3, 6, 4)])
def test_a_convolution_that_does_not_fit(shape, file):
    """Two groups, another kernel, another number of outputs."""
    axes = "o i k -> k i o" if len(shape) == 3 else ""
    naming = Naming((Entry("h.cnn.weight", "kernel", "conv", axes),))
    tensors, _ = safetensors_file.read(file)
    safetensors_file.write(file, {name: x for name, x in tensors.items() if "cnn.lora" in name})
    with pytest.raises(AdapterFileError, match=r"h.cnn: .* if it is grouped, merge it"):
        loralib.load(file, {"kernel": np.zeros(shape, "f4")}, naming, alpha=4)


def test_everything_wrong_is_told_at_once(file):
    tensors, _ = safetensors_file.read(file)
    del tensors["h.up.lora_B"]
    tensors["h.emb.lora_A"] = tensors["h.emb.lora_A"][:, :4]
    tensors["h.up.weight"] = np.ones((10, 6), "f4")
    tensors["h.more.lora_A"] = np.ones((2, 6), "f4")
    tensors["h.up.bias"] = tensors["h.up.bias"].astype(np.int32)
    tensors["h.qkv.bias"] = tensors["h.qkv.bias"][:3]
    safetensors_file.write(file, tensors)
    enabled = {"qkv": [True] * 3, "nothing": [True]}
    with pytest.raises(AdapterFileError) as caught:
        loralib.load(file, leaves(NAMING), NAMING, alpha=4, enabled=enabled)
    lines = [line.partition(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        *("enabled", "h.c_attn", "h.emb", "h.more", "h.qkv.bias", "h.up.bias", "h.up.weight"),
        "h.up",
    ]
    with pytest.warns(UserWarning, match=r"ignored what does not fit the base:\n"):
        adapters = loralib.load(
            file, leaves(NAMING), NAMING, alpha=4, enabled=enabled, strict=False
        )
    assert set(adapted_nodes(adapters)) == {
        *("h/qkv/kernel", "h/c_attn/bias", "h/cnn/kernel", "h/cnn/bias")
    }


@pytest.mark.parametrize("alpha", [None, "4", float("nan"), True])
def test_alpha_is_a_number(alpha, file):
    with pytest.raises(ConfigError, match="alpha"):
        loralib.load(file, leaves(NAMING), NAMING, alpha=alpha)


@pytest.mark.parametrize("enabled", [{"qkv": True}, {"qkv": [False]}, ["qkv"], {"qkv": "yes"}])
def test_enabled_maps_to_flags(enabled, file):
    with pytest.raises(ConfigError, match="enabled"):
        loralib.load(file, leaves(NAMING), NAMING, alpha=4, enabled=enabled)
