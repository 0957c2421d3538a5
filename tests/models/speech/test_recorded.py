"""Whisper against transformers 5.24 and peft 0.21.2, as record_speech.py recorded it."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.models.families import FAMILIES
from lora_jax.models.weights.family import Options
from tests.models import recorded
from tests.models.encoder.test_recorded import same_tensors, write_adapter

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model():
    return recorded.load("whisper")


@pytest.fixture(scope="module")
def want():
    return recorded.expected("whisper")


@pytest.fixture
def adapted(model, tmp_path):
    adapters = peft.load(write_adapter("whisper", tmp_path), model.params, model.naming)
    return lora.join(model.params, adapters)


def test_logits_with_an_adapter_and_without(model, want, adapted):
    apply = jax.jit(lora.lora(lambda p, ids, x: model.apply(p, ids, features=x), on_dense="error"))
    for key, params in {"adapted": adapted, "logits": lora.disable(adapted)}.items():
        y = apply(params, want["ids"], want["features"])
        np.testing.assert_allclose(y, want[key], atol=4e-6)


def test_tokens_with_an_adapter_and_without(model, want, adapted):
    """With a cache, a prompt of two tokens and then one after the other."""
    said = lambda params, **options: models.transcribe(
        model.apply, params, want["features"], want["ids"][:, :2], steps=9, **options
    )
    np.testing.assert_array_equal(said(adapted), want["adapted_greedy"])
    np.testing.assert_array_equal(said(lora.disable(adapted)), want["greedy"])
    assert (want["adapted_greedy"] != want["greedy"]).any()


def test_tokens_that_are_not_said(model, want):
    options = {key: want[key].tolist() for key in ("suppress", "begin_suppress")}
    found = models.transcribe(
        model.apply, model.params, want["features"], want["ids"][:, :2], steps=9, **options
    )
    np.testing.assert_array_equal(found, want["suppressed"])
    assert not np.isin(found, options["suppress"]).any()


def test_files_written_are_those_read(model, tmp_path):
    models.save(tmp_path / "model", model)
    file = "model.safetensors"
    same_tensors(tmp_path / "model" / file, recorded.FIXTURES / "whisper" / file)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    source = write_adapter("whisper", tmp_path)
    adapters, config = peft.load(source, model.params, model.naming), peft.read_config(source)
    peft.save(tmp_path / "again", adapters, model.naming, base=model.params, config=config)
    same_tensors(tmp_path / "again" / peft.TENSORS, source / peft.TENSORS)
    assert peft.read_config(tmp_path / "again").target_modules == config.target_modules


def test_a_spectrogram(want):
    """A rising tone, and a second of it padded; every ninth frame was recorded."""
    times = np.arange(12_000) / 16_000
    sound = (0.4 * np.sin(6000 * times**2) + 0.05 * np.sin(40_000 * times)).astype(np.float32)
    found = models.log_mel(np.stack([sound, sound]), bins=20, frames=100)
    np.testing.assert_allclose(found[1, ::9], want["mel"], atol=2e-6)
    for audio in (np.zeros(9, int), np.full(9, np.nan), np.zeros((1, 1, 9))):
        with pytest.raises(lora.ConfigError, match="audio must be finite floats"):
            models.log_mel(audio)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 18}, "d_model 18 is not a multiple of decoder_attention_heads 4"),
        ({"encoder_layers": 0}, "encoder_layers must be a positive int, got 0"),
        ({"activation_function": ["gelu"]}, "activation_function .* is not one of"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: false is not supported"),
        ({"architectures": ["WhisperForCausalLM"]}, "architectures: 'WhisperForCausalLM' is not"),
    ],
)
def test_configurations_that_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["whisper"].module({**model.settings, **change}, Options())


@pytest.mark.parametrize("name", ["vit", "siglip", "whisper"])
def test_half_of_the_bits(name):
    """Pixels and features are float32, as they are made, and the model is not."""
    half = models.load(recorded.FIXTURES / name, "bfloat16")
    y = jax.eval_shape(half.apply, half.params, **half.family.inputs(half.module))
    assert y.dtype == "bfloat16"


def test_what_whisper_refuses(model, want):
    ids, features = want["ids"], want["features"]
    shape = lambda *args, **options: jax.eval_shape(
        lambda: model.apply(model.params, *args, **options)
    )
    with pytest.raises(ValueError, match=r"either features= of the recording, or cache= of start"):
        shape(ids)
    with pytest.raises(ValueError, match=r"features must be \[batch, 20, 6\], got \(2, 19, 6\)"):
        shape(ids, features=features[:, :19])
    with pytest.raises(ValueError, match="length 17 is above max_target_positions 16"):
        shape(np.zeros((2, 17), int), features=features)
    with pytest.raises(ValueError, match="length 17 is above max_target_positions 16"):
        shape(features, 17, method="start")
    with pytest.raises(ValueError, match="prompt must have a token or more, got none"):
        models.transcribe(model.apply, model.params, features, [], steps=2)
