"""Layers of MaxText 0.2.5 with factors of qwix 0.1.8, and MaxText's own conversions to Hugging
Face's order, recorded by `record_maxtext.py`."""

import pathlib

import numpy as np
import pytest

from lora_jax import ConfigError, orbax, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.orbax.nested import nest
from tests.parity.checkpoints.test_trainers import plain

RECORDED = np.load(pathlib.Path(__file__).parent / "maxtext.npz")
NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
NAMES |= {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def recorded(kind):
    return {
        name.removeprefix(f"{kind}/"): RECORDED[name]
        for name in RECORDED.files
        if name.startswith(f"{kind}/")
    }


def tree(layers="layers_0", **more):
    """Return a checkpoint; its weights are zeros, so what is merged is the update."""
    leaves = {
        **{path: np.zeros_like(x) for path, x in recorded("delta").items()},
        **recorded("tree"),
    }
    attention = "decoder/layers_0/self_attention"
    leaves |= {f"{attention}/{name}": np.ones(4, "f4") for name in more.get("beside", ())}
    return nest({tuple(p.replace("layers_0", layers).split("/")): x for p, x in leaves.items()})


def test_updates_are_those_of_the_layers():
    nodes = adapted_nodes(orbax.from_tree(tree(), "maxtext", alpha=2.0))
    deltas = recorded("delta")
    assert nodes.keys() == deltas.keys() and len(deltas) == 7
    for path, delta in deltas.items():
        np.testing.assert_allclose(plain(nodes[path]), delta, atol=2e-6)


@pytest.mark.parametrize("layers", ["layers_0", "layers/0"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_to_peft_is_maxtexts_own_conversion(family, layers, tmp_path):
    """Of the weights: Llama's queries grow and its rotations change; MaxText's adapters do not."""
    format = {"llama": "maxtext", "qwen": "maxtext_qwen"}[family]
    beside = ("query_norm/scale", "key_norm/scale") if family == "qwen" else ()
    params = orbax.from_tree(tree(layers, beside=beside), format, alpha=2.0)
    orbax.to_peft(tmp_path, params, format)
    tensors, config = safetensors_file.read(tmp_path / peft.TENSORS)[0], peft.read_config(tmp_path)
    wanted = recorded(family)
    assert len(tensors) == 2 * len(wanted)
    for path, want in wanted.items():
        part, name = path.split("/")[2:4]
        module = f"model.layers.0.{part.replace('self_attention', 'self_attn')}.{NAMES[name]}"
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(config.scale(module, len(a)) * (b @ a), want, atol=2e-6)


@pytest.mark.parametrize("leaf", ["query_norm/scale", "query/bias"])
def test_a_qwen_is_not_converted_as_a_llama(leaf, tmp_path):
    params = orbax.from_tree(tree(beside=[leaf]), "maxtext", alpha=2.0)
    with pytest.raises(ConfigError, match=rf'{leaf}: MaxText.*give the format "maxtext_qwen"'):
        orbax.to_peft(tmp_path / "peft", params, "maxtext")
    assert not (tmp_path / "peft").exists()
