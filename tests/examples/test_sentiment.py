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
from examples.sentiment import sentiment
from examples.sentiment.report import Report
from lora_jax.models import assets
from lora_jax.models.encoder.bert import BertConfig
from lora_jax.training import Row, Rows, TrainingError
from tests.models.encoder.test_bert import shapes

WORDS = ["good", "fine", "great", "lovely", "bad", "dull", "awful", "boring", "film", "the", "a"]
CONFIG = BertConfig(
    vocab_size=len(WORDS) + 1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
)
RECIPE = sentiment.Recipe(
    steps=25, rank=2, alpha=4, learning_rate=3e-2, rows=8, length=12, slots=3, predict_rows=8
)


@pytest.fixture
def encoder(tmp_path):
    """Write a directory with an encoder of random weights and a tokenizer."""
    directory = tmp_path / "encoder"
    directory.mkdir()
    settings = {"model_type": "bert", **dataclasses.asdict(CONFIG)}
    (directory / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(CONFIG).items():
        # Scales of one without biases keep the texts apart, as in a trained model.
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


def make_up(n: int, seed: int) -> Rows:
    """Make up reviews of filler words and of words that tell the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, label in enumerate(rng.integers(0, 2, n).tolist()):
        fillers = rng.choice(WORDS[8:], rng.integers(1, 5))
        telling = rng.choice(WORDS[:4] if label else WORDS[4:8], 3)
        text = " ".join(rng.permutation([*fillers, *telling]))
        rows.append(Row(i, {"text": text, "label": label}))
    return Rows("made_up.txt", "label", tuple(rows))


@pytest.fixture
def report():
    return Report(Console(file=io.StringIO(), width=100))


def test_the_run(encoder, tmp_path, report):
    train, held_out = make_up(240, seed=1), make_up(60, seed=2)
    scores = sentiment.run(RECIPE, encoder, train, held_out, tmp_path / "out", report)
    report.table(scores.rows())

    assert scores.adapted == scores.merged > 0.9 > scores.majority
    assert scores.flips == 0 and scores.difference < 1e-5
    assert len(scores.losses) == RECIPE.steps
    assert np.mean(scores.losses[-5:]) < 0.5 * np.mean(scores.losses[:5])
    # query and value, A and B of rank 2; a head of 16 times 2 and its bias
    assert scores.trained == 2 * 2 * 16 * 2 + 16 * 2 + 2

    printed = report.console.file.getvalue()
    assert f"trainable params: {scores.trained:,} ||" in printed
    for row in ("linear probe", "LoRA and head", "reloaded and merged", "train", "total"):
        assert row in printed
    files = [tmp_path / "out" / name for name in ("loss.png", "adapter.safetensors")]
    assert report.files == files and all(str(file) in printed for file in files)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert lora.read_metadata(files[1])["config"]["rank"] == 2


@pytest.mark.slow
def test_the_command(encoder, tmp_path, monkeypatch, capsys):
    """Run `main` from the cache to the table, without pip."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    assets.ENCODER.directory(tmp_path / "cache").parent.mkdir()
    encoder.rename(assets.ENCODER.directory(tmp_path / "cache"))
    lines = [
        f"{row.line}\t{2 * row.values['label'] - 1}\t{row.values['text']} {row.line}"
        for row in make_up(120, seed=3).rows  # the number keeps texts distinct
    ]
    directory = assets.REVIEWS.directory(tmp_path / "cache")
    directory.mkdir()
    (directory / "movie_reviews.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sentiment, "Recipe", lambda **given: dataclasses.replace(RECIPE, **given))
    arguments = ["--steps", "2", "--train", "90", "--held-out", "30"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "reloaded and merged" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter.safetensors").is_file()

    assert command.main(["--train", "99999", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {directory / 'movie_reviews.txt'} has 120 reviews, but 99999 + 2000 were requested"
    )


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--rank", "two"]])
def test_arguments_that_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "invalid" in capsys.readouterr().err


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
    model, params = sentiment.load(encoder, RECIPE)
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params)
    rows = jax.ShapeDtypeStruct((RECIPE.rows, RECIPE.length), np.int32)
    base, adapters = lora.split(
        lora.init(jax.random.key(0), params, RECIPE.lora_config(), model, rows, rows)
    )
    part = sentiment.pack(make_up(60, seed=4), encoder, RECIPE)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        sentiment.fine_tune(RECIPE, model, base, adapters, part, report)
