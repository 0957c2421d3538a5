"""`eval` of language models against the mean cross-entropy in float64 of each predicted token."""

import json

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import models, peft
from lora_jax.models.text.tokenizer import Tokenizer
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def world(tmp_path, monkeypatch):
    files.everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(folder, ids, start, adapter):
    """Return the losses of `ids[start:]`, each from all tokens before it."""
    pretrained = models.load(folder / "my-model")
    params = pretrained.params
    if adapter:
        overlay = peft.load(folder / adapter, params, pretrained.naming)
        params = lora_jax.merge(lora_jax.join(params, overlay))
    padded = np.zeros((1, 63), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(jax.jit(pretrained.apply)(params, padded), np.float64)[0, : len(ids) - 1]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-logs[i - 1, ids[i]] for i in range(start, len(ids))]


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.slow), "my-adapter"])
def test_a_text_and_rows(adapter, world, run):
    more = ["--adapter", adapter] if adapter else []
    tokenizer = Tokenizer.load(world / "my-model")
    (world / "line.txt").write_text("To be, or not to be, that is it.")
    ids = tokenizer.encode("To be, or not to be, that is it.")
    wanted = losses(world, ids, 1, adapter)
    found = json.loads(run("eval", "-m", "my-model", "--data", "line.txt", "--json", *more).out)
    assert found["tokens"] == len(wanted) and found["rows"] == 1
    assert found["loss"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(wanted)), rel=1e-5)
    wanted = []
    for n in range(3):  # completions and the end of the text count, prompts do not
        prompt, completion = tokenizer.encode(f"{n} + 1 ="), tokenizer.encode(f" {n + 1}")
        wanted += losses(world, [*prompt, *completion, tokenizer.eos_id], len(prompt), adapter)
    words = ["eval", "-m", "my-model", "--data", "held-out.jsonl", *more]
    found = json.loads(run(*words, "--json").out)
    assert found["tokens"] == len(wanted)
    assert found["loss"] == pytest.approx(np.mean(wanted), rel=1e-5)
    lines = dict(line.split() for line in run(*words).out.splitlines())
    assert lines.keys() == {"rows", "tokens", "loss", "perplexity"}
    assert float(lines["loss"]) == pytest.approx(found["loss"], abs=1e-4)


def test_files_count_by_their_tokens(world, run):
    one, other = (
        json.loads(run("eval", "-m", "my-model", "--data", x, "--length", 32, "--json").out)
        for x in ("play.txt", "held-out.jsonl")
    )
    both = ["--data", "play.txt", "--data", "held-out.jsonl", "--length", 32, "--json"]
    found = json.loads(run("eval", "-m", "my-model", *both).out)
    assert found["tokens"] == one["tokens"] + other["tokens"]
    total = one["loss"] * one["tokens"] + other["loss"] * other["tokens"]
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)


def test_failures(world, fails):
    assert "cannot read none.txt" in fails("eval", "-m", "my-model", "--data", "none.txt")
    words = ["eval", "-m", "my-model", "--data", "play.txt"]
    assert "--length 65: must be from 2 to 64" in fails(*words, "--length", 65)
    assert "cannot be trained on label rows" in fails(*words[:3], "--data", "reviews.jsonl")
