"""The commands on models that are not of texts: those on weights work, the others say so."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.cli import sources
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files.disk import safetensors_file
from tests.models import recorded
from tests.models.encoder.test_recorded import write_adapter


@pytest.mark.parametrize("name", ["vit", "siglip", "whisper"])
def test_commands_on_texts_refuse_others(name, fails, tmp_path):
    model, data = recorded.FIXTURES / name, tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    stem, what = {
        "vit": ("ViT", "images"),
        "siglip": ("Siglip", "images"),
        "whisper": ("Whisper", "speech"),
    }[name]
    for command in (
        ["generate", "--prompt", "a"],
        ["chat"],
        ["predict", "a"],
        ["eval", "--data", data],
        ["train", "--data", data, "--out", tmp_path / "out", "--task", "classification"],
    ):
        said = fails(*command, "--model", model)
        assert f"{name}: {stem} is a model of {what}, but this command needs" in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_an_encoder_generates_nothing(name, fails):
    said = fails("generate", "--model", recorded.FIXTURES / name, "--prompt", "a")
    assert "is an encoder of texts, but this command needs a decoder; lora_jax.models" in said


def test_an_adapter_of_transformers_4(tmp_path):
    """Its modules had the names that models' files still have."""
    adapter = write_adapter("vit", tmp_path)
    found = sources.find_model(str(recorded.FIXTURES / "vit"))
    new = sources.load(found, adapter).params
    tensors, metadata = safetensors_file.read(adapter / peft.TENSORS)
    older = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    config = json.loads((adapter / peft.CONFIG).read_text())
    config["target_modules"] = ["query", "key", "value", "dense", "projection"]
    (adapter / peft.CONFIG).write_text(json.dumps(config))
    for new_name, old_name in older.items():
        tensors = {name.replace(new_name, old_name): x for name, x in tensors.items()}
    safetensors_file.write(adapter / peft.TENSORS, tensors, metadata)
    old = sources.load(found, adapter).params
    for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(one, other)


def test_merge_and_quantize_an_image_classifier(run, tmp_path):
    """Its adapter brings a trained head, which is no head of a classifier of texts."""
    base, adapter = recorded.FIXTURES / "vit", write_adapter("vit", tmp_path)
    done = run("merge", "--model", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert (done.status, done.err) == (0, ""), done
    model = recorded.load("vit")
    params = lora.join(model.params, peft.load(adapter, model.params, model.naming))
    wanted, _ = flatten_with_paths(lora.merge(params))
    got, _ = flatten_with_paths(models.load(tmp_path / "merged").params)
    for path, x in wanted.items():
        np.testing.assert_allclose(got[path], x, atol=1e-6, err_msg=path)
    one, _ = safetensors_file.read(tmp_path / "merged" / "model.safetensors")
    other, _ = safetensors_file.read(base / "model.safetensors")
    assert one.keys() == other.keys()
    out = tmp_path / "small"
    assert run("quantize", "--model", base, "--kind", "int8", "--out", out).status == 0
    small = models.load(out, quantize="keep").params["layer_1"]["mlp"]["up"]["kernel"]
    exact = np.asarray(model.params["layer_1"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(lora.dequantize(small), exact, atol=np.abs(exact).max() / 127)
