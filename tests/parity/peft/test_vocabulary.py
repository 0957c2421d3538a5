"""Adapters that peft saved with a resized vocabulary: the logits of transformers with them."""

import json
import pathlib

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.cli import sources
from lora_jax.files.disk import safetensors_file
from tests.models.recorded import FIXTURES, load

pytestmark = pytest.mark.usefixtures("quick_compile")

FILE = pathlib.Path(__file__).parent / "recorded" / "vocabulary.npz"
CASES = {  # -> the model, and whether the head must be untied
    "frozen": ("llama", False),
    "frozen tied": ("qwen2", False),
    "trained": ("llama", False),
    "trained tied": ("qwen2", False),
    "trained apart": ("qwen2", True),
    "head alone": ("qwen2", True),
    "embedding alone": ("qwen2", True),
    "factors": ("llama", False),
    "rows": ("llama", False),
    "smaller": ("llama", False),
}


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture
def adapter(recorded, tmp_path):
    def write(case):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / file).write_bytes(recorded[f"{case}/{file}"].tobytes())
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("case", "scan"), [*((case, False) for case in CASES), ("trained tied", True), ("rows", True)]
)
def test_logits(case, scan, adapter, recorded):
    name, untied = CASES[case]
    folder, base = adapter(case), load(name, scan=scan)
    model = models.resize_for_adapter(base, folder)
    tokens = 60 if case == "smaller" else 70
    assert model.config.vocab_size == model.settings["vocab_size"] == tokens
    was_tied = base.config.tie_word_embeddings
    assert model.config.tie_word_embeddings == (was_tied and not untied)
    adapters = peft.load(folder, model.params, model.naming)
    ids = recorded["small ids" if case == "smaller" else "ids"]
    found = jax.jit(lora.lora(model.apply))(lora.join(model.params, adapters), ids)
    np.testing.assert_allclose(found, recorded[f"{case}/logits"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["frozen tied", "trained apart", "rows"])
def test_merged_it_is_a_model_with_as_many_tokens(case, adapter, recorded, tmp_path_factory):
    pytest.importorskip("typer")
    from lora_jax.cli import main

    out = tmp_path_factory.mktemp("merged") / "model"
    base = FIXTURES / CASES[case][0]
    words = ["merge", "--model", base, "--adapter", adapter(case), "--out", out]
    assert main([str(word) for word in words]) == 0
    config = json.loads((out / "config.json").read_text())
    tensors, _ = safetensors_file.read(out / "model.safetensors")
    is_tied = config["tie_word_embeddings"]
    assert config["vocab_size"] == 70 and is_tied == (case == "frozen tied")
    assert ("lm_head.weight" in tensors) == (not is_tied)
    assert tensors["model.embed_tokens.weight"].shape == (70, 32)
    model = models.load(out)
    found = jax.jit(model.apply)(model.params, recorded["ids"])
    np.testing.assert_allclose(found, recorded[f"{case}/logits"], rtol=2e-5, atol=2e-5)


def test_the_command_line_resizes_the_base(adapter):
    loaded = sources.load(sources.find_model(str(FIXTURES / "llama")), adapter("trained"))
    assert loaded.model.config.vocab_size == 70


def test_an_adapter_of_the_same_vocabulary_changes_nothing(tmp_path):
    model = load("qwen2")
    config = lora.LoraConfig(rank=2, targets=["query", "embedding/embedding"])
    params = lora.init(jax.random.key(0), model.params, config, model.apply, np.ones((1, 2), int))
    peft.save(tmp_path / "a", params, model.naming, config=config)
    assert models.resize_for_adapter(model, tmp_path / "a") is model
