"""The whole run on a tiny random encoder and reviews made here."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_jax as lora
from examples.sentiment import __main__ as command
from examples.sentiment import classifier, reviews, sentiment
from examples.sentiment.report import Report
from lora_jax.models import assets
from lora_jax.models.bert import Bert, BertConfig
from tests.models.test_bert import shapes

WORDS = ["good", "fine", "great", "lovely", "bad", "dull", "awful", "boring", "film", "the", "a"]
CONFIG = BertConfig(
    vocab_size=len(WORDS) + 1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
)
SETTINGS = sentiment.Settings(
    steps=25, rank=2, alpha=4, learning_rate=3e-2, rows=8, length=12, slots=3, predict_rows=8
)


@pytest.fixture
def encoder(tmp_path):
    """A directory with an encoder of random weights and a tokenizer."""
    directory = tmp_path / "encoder"
    directory.mkdir()
    settings = {"model_type": "bert", **dataclasses.asdict(CONFIG)}
    (directory / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(CONFIG).items():
        # Scales of one and no biases keep the texts apart, as in a model that was trained.
        plain = float(name.endswith("LayerNorm.weight")) + np.zeros(shape)
        tensors[name] = plain if len(shape) == 1 else rng.normal(size=shape, scale=0.3)
    save_file(
        {n: t.astype(np.float32) for n, t in tensors.items()}, directory / "model.safetensors"
    )
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def made_up(n: int, seed: int) -> reviews.Reviews:
    """Reviews of filler words and of others that tell the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).astype(np.int32)
    texts = []
    for label in labels:
        fillers = rng.choice(WORDS[8:], rng.integers(1, 5))
        telling = rng.choice(WORDS[:4] if label else WORDS[4:8], 3)
        texts.append(" ".join(rng.permutation([*fillers, *telling])))
    return reviews.Reviews(tuple(texts), labels)


@pytest.fixture
def report():
    return Report(Console(file=io.StringIO(), width=100))


def test_the_run(encoder, tmp_path, report):
    train, held_out = made_up(240, seed=1), made_up(60, seed=2)
    outcome = sentiment.run(SETTINGS, encoder, train, held_out, tmp_path / "out", report)
    report.table(outcome.rows())

    assert outcome.adapted == outcome.merged > 0.9 > outcome.majority
    assert outcome.flips == 0 and outcome.difference < 1e-5
    assert len(outcome.losses) == SETTINGS.steps
    assert np.mean(outcome.losses[-5:]) < 0.5 * np.mean(outcome.losses[:5])
    # query and value, A and B of rank 2; a head of 16 times 2 and its bias
    assert outcome.trained == 2 * 2 * 16 * 2 + 16 * 2 + 2

    printed = report.console.file.getvalue()
    assert f"trainable params: {outcome.trained:,} ||" in printed
    for row in ("linear probe", "LoRA and head", "reloaded and merged", "train", "total"):
        assert row in printed
    files = [tmp_path / "out" / name for name in ("loss.png", "adapter.safetensors")]
    assert report.files == files and all(str(file) in printed for file in files)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert lora.read_metadata(files[1])["config"]["rank"] == 2


def test_the_command(encoder, tmp_path, monkeypatch, capsys):
    """`main` from the cache to the table, without pip."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    assets.ENCODER.directory(tmp_path / "cache").parent.mkdir()
    encoder.rename(assets.ENCODER.directory(tmp_path / "cache"))
    texts = made_up(120, seed=3)
    lines = [
        f"{i}\t{2 * label - 1}\t{text} {i}"  # the number keeps texts distinct
        for i, (text, label) in enumerate(zip(texts.texts, texts.labels, strict=True))
    ]
    directory = assets.REVIEWS.directory(tmp_path / "cache")
    directory.mkdir()
    (directory / "movie_reviews.txt").write_text("\n".join(lines))
    monkeypatch.setattr(
        sentiment, "Settings", lambda **given: dataclasses.replace(SETTINGS, **given)
    )
    arguments = ["--steps", "2", "--train", "90", "--held-out", "30"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "reloaded and merged" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter.safetensors").is_file()

    assert command.main(["--train", "99999", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: 99999 + 2000 reviews were asked for; there are 120"


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--rank", "two"]])
def test_arguments_that_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "invalid" in capsys.readouterr().err


def test_cross_entropy_counts_present_texts_alone():
    logits = np.array([[[0.0, np.log(3)], [9.0, -9.0]], [[0.0, np.log(3)], [0.0, 0.0]]], np.float32)
    labels = np.array([[1, -1], [0, -1]])
    expected = (np.log(4 / 3) + np.log(4)) / 2
    np.testing.assert_allclose(classifier.cross_entropy(logits, labels), expected, rtol=1e-6)
    assert classifier.cross_entropy(logits, np.full((2, 2), -1)) == 0


def test_models_that_disagree():
    logits = np.array([[1.0, 2.0], [3.0, 2.9999]])
    assert sentiment.compare("merged", logits, logits) == (0.0, 0)
    difference, flips = sentiment.compare("merged", logits, logits + [[0, 0], [0, 2e-4]])
    assert difference == pytest.approx(2e-4) and flips == 1
    for other in (logits + [[0, 0.1], [0, 0]], logits * np.nan):
        with pytest.raises(sentiment.DisagreementError, match="merged and adapted logits differ"):
            sentiment.compare("merged", logits, other)


def test_a_reloaded_adapter_that_differs():
    trained = {"a": np.ones(2), "b": {"c": np.zeros(3)}}
    sentiment.check_reloaded(trained, jax.tree.map(np.copy, trained))
    with pytest.raises(sentiment.DisagreementError, match=r"\['b'\]\['c'\]"):
        sentiment.check_reloaded(trained, {**trained, "b": {"c": np.full(3, 1e-9)}})


def test_a_loss_that_is_not_finite(encoder, report):
    train = sentiment._data(made_up(60, seed=4), encoder, SETTINGS)
    model = Bert(CONFIG)
    rows = jax.ShapeDtypeStruct((SETTINGS.rows, SETTINGS.length), np.int32)
    shapes_only = jax.eval_shape(model.init, jax.random.key(0), rows, rows)["params"]
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes_only)
    apply, params = classifier.build(model, params, SETTINGS.slots, seed=0)
    config = SETTINGS.lora_config()
    base, adapters = lora.split(lora.init(jax.random.key(0), params, config, apply, rows, rows))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        sentiment.fine_tune(SETTINGS, apply, base, adapters, train, report)
