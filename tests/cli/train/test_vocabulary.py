"""`train --add-token` and `--untie-head`: what is trained, written, and read back."""

import json

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.cli import main
from lora_jax.files.disk import safetensors_file
from lora_jax.models.text import Tokenizer
from lora_jax.training import log

pytestmark = [pytest.mark.usefixtures("quick_compile"), pytest.mark.slow]  # it trains three runs

TEXT = "Say <think> now and </think> then. " * 60
TOKENS = ("--add-token", "<think>", "--add-token", "</think>")


def command(folder, name, *more):
    words = ["train", "--model", "tiny", "--data", folder / "play.txt", "--out", folder / name]
    words += ["--steps", 4, "--lr", 1e-2, "--length", 32, "--rank", 2, "--targets", "q_proj"]
    return [str(word) for word in (*words, "--eval", folder / "play.txt", *more)]


CASES = {"tied": TOKENS, "untied": (*TOKENS, "--untie-head"), "head": ("--untie-head",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "play.txt").write_text(TEXT)
    for name, more in CASES.items():
        assert main(command(folder, name, *more)) == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_and_the_merged_model_have_the_loss_that_was_measured(
    name, runs, run, tmp_path
):
    last = log.evaluations(log.read(runs / name / "log.jsonl"))[-1]
    adapter, out = runs / name / "adapter", tmp_path / "merged"
    done = run("merge", "--model", "tiny", "--adapter", adapter, "--out", out)
    assert (done.status, done.err) == (0, "")
    for words in (["--model", "tiny", "--adapter", adapter], ["--model", out]):
        done = run("eval", *words, "--data", runs / "play.txt", "--length", 32, "--json")
        assert json.loads(done.out)["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == (260 if name == "head" else 262)
    assert config["tie_word_embeddings"] == (name == "tied")


@pytest.mark.parametrize("name", CASES)
def test_pefts_file_has_the_embedding_and_the_head_in_full(name, runs):
    adapter = runs / name / "adapter"
    tensors, _ = safetensors_file.read(adapter / "adapter_model.safetensors")
    whole = {
        key.removeprefix("base_model.model."): x for key, x in tensors.items() if "lora_" not in key
    }
    embedding, head = whole.get("model.embed_tokens.weight"), whole["lm_head.weight"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"][-1] == ("lm_head" if name == "head" else "model.embed_tokens")
    if name == "head":
        assert embedding is None and head.shape == (260, 64)
        assert not (adapter / "tokenizer.json").exists()
        return
    assert embedding.shape == head.shape == (262, 64)
    assert np.array_equal(embedding, head) == (name == "tied")
    assert bool(config["ensure_weight_tying"]) == (name == "tied")


def test_the_tokenizer_beside_the_adapter_has_the_tokens(runs, run):
    tokenizer = Tokenizer.load(runs / "tied" / "adapter")
    assert tokenizer.encode("a<think>")[1:] == [260] and tokenizer.encode("</think>") == [261]
    assert tokenizer.decode([260, 261]) == "<think></think>"
    words = ["generate", "--model", "tiny", "--adapter", runs / "tied" / "adapter"]
    assert run(*words, "--prompt", "<think>", "--max-tokens", 2).status == 0


def test_a_run_is_resumed_with_its_tokens_alone(runs, run, fails):
    words = command(runs, "tied", *TOKENS, "--resume")
    assert run(*words).status == 0
    assert "different settings" in fails(*command(runs, "tied", "--resume"))


def test_failures(runs, fails, tmp_path):
    out = ["--out", tmp_path / "out"]
    known = fails(*command(runs, "tied", "--add-token", "a"), *out)
    assert "--add-token a: the tokenizer has this token already" in known
    assert "the text is empty" in fails(*command(runs, "tied", "--add-token", " "), *out)
    classes = command(runs, "tied", "--untie-head", "--task", "classification")
    assert "are for --task causal-lm" in fails(*classes, *out, status=2)
    both = command(runs, "tied", "--untie-head", "--adapter", runs / "tied" / "adapter")
    both = [word for word in both if word not in ("--rank", "2", "--targets", "q_proj")]
    assert "leave out --untie-head" in fails(*both, *out, status=2)
    assert not (tmp_path / "out").exists()
