"""Timestamps and long recordings against transformers 5.24, as record_timestamps.py recorded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.speech.cache import SpeechCache
from lora_jax.models.speech.timestamps import TimedCache
from tests.models import recorded

FOLDER = recorded.FIXTURES / "whisper_timestamps"


@pytest.fixture(scope="module")
def tokens():
    return models.SpeechTokens.load(FOLDER)


def test_what_may_come_next(tokens):
    """Behind each transcript: the logits of transformers' own rules."""
    want, rules = recorded.expected("whisper_timestamps"), tokens.timestamps
    mask = jax.jit(rules.mask)
    for said, scores, ruled in zip(want["said"], want["scores"], want["ruled"], strict=True):
        plain = SpeechCache((), (), jnp.zeros((1, 9), int), jnp.asarray(3))
        cache = TimedCache.begin(plain, rules, 3).after(plain, jnp.array([[21, 22, 23]]), rules)
        for i, token in enumerate(said[said >= 0], 4):
            plain = SpeechCache((), (), plain.segments, jnp.asarray(i))
            cache = cache.after(plain, jnp.array([[token]]), rules)
        found = mask(jnp.asarray(scores)[None, None], cache)[0, 0]
        np.testing.assert_array_equal(found, ruled, err_msg=str(said))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_long_recording(scan, tokens, quick_compile):
    model, want = recorded.load("whisper_timestamps", scan=scan), recorded.expected(FOLDER.name)
    options = {"suppress": tokens.suppress, "begin_suppress": tokens.begin_suppress}
    parts = models.transcribe_long(
        *(model.apply, model.params, want["features"], tokens.prompt("de", timestamps=True)),
        window=model.config.frames,
        timestamps=tokens.timestamps,
        steps=18,
        **options,
    )
    assert len(parts) > 3
    np.testing.assert_allclose([(x.start, x.end) for x in parts], want["times"], atol=1e-9)
    assert [list(x.tokens) for x in parts] == [list(x[x >= 0]) for x in want["tokens"]]


def test_tokens_in_front(tokens):
    assert tokens.prompt("de") == [21, 25, 23, 26] == tokens.prompt("<|de|>")
    assert tokens.prompt("en", "translate", timestamps=True) == [21, 22, 24]
    english = models.SpeechTokens(21, 20, 26)
    assert english.prompt() == [21, 26] and english.prompt("en", timestamps=True) == [21]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.prompt(), r"language None is not one of \['<\|de\|>', '<\|en\|>'\]"),
        (lambda x: x.prompt("fr"), r"language '<\|fr\|>' is not one of"),
        (lambda x: x.prompt("en", "sing"), "task 'sing' is not one of"),
        (lambda x: models.SpeechTokens(1, 2).prompt("de"), "this model only transcribes English"),
        (lambda x: models.SpeechTokens(1, 2).timestamps, "this model has no no_timestamps_token"),
        (lambda x: models.transcribe_long(None, {}, np.zeros((2, 3, 4)), [1], window=2,
                                          timestamps=None, steps=1), "of one recording, got"),
        (lambda x: models.log_mel(np.zeros(9), rate=44_100), "hears 16000 samples per second"),
        (lambda x: models.log_mel(np.zeros(9), frames=None), "audio has 9 samples, fewer than"),
    ],
)  # fmt: skip
def test_what_cannot_be(call, message, tokens):
    with pytest.raises(lora.ConfigError, match=message):
        call(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": [1]}, "eos_token_id must be the number of a token"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id must be the number of a token"),
        ({"lang_to_id": [3]}, "lang_to_id must be an object of tokens"),
        ({"task_to_id": {"a": "b"}}, "a must be the number of a token, got 'b'"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must be a list of tokens"),
    ],
)
def test_files_that_are_refused(change, message, tmp_path):
    file = "generation_config.json"
    settings = {**json.loads((FOLDER / file).read_text()), **change}
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        models.SpeechTokens.load(tmp_path)


def test_all_frames_of_a_recording():
    """A long recording has the features that its windows would have, but for where they end."""
    sound = np.sin(np.arange(33_000) / 9.0)
    found = models.log_mel(sound, bins=20, frames=None)
    assert found.shape == (206, 20)
    np.testing.assert_allclose(found[:198], models.log_mel(sound, bins=20, frames=206)[:198])
