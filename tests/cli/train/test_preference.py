"""`lora-jax train --task dpo` and its relatives: figures by hand, resuming, meshes, refusals."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("typer")

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import main
from lora_jax.cli.jobs.training import reference as module
from lora_jax.cli.train_options import DpoName, TrainOptions
from lora_jax.files.disk import safetensors_file
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training import log, preference
from lora_jax.training.batching import Data
from tests.cli.train.command import jsonl, words

STEPS = ("--steps", 4, "--warmup", 0, "--schedule", "constant", "--eval-split", 0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", "preference", count=12)


@pytest.fixture(scope="module")
def tuned(data, model, tmp_path_factory):
    """Return the directory of a run that held out all that it trained on."""
    out = tmp_path_factory.mktemp("runs") / "dpo"
    more = ("--model", model, "--task", "dpo", "--beta", 0.5, "--eval", data, *STEPS[:6])
    assert main(words(data, out, *more)) == 0
    return out


def losses(out):
    return [r.get("loss", r.get("eval_loss")) for r in log.read(out / "log.jsonl")]


def adapter(out):
    return safetensors_file.read(out / "adapter" / "adapter_model.safetensors")[0]


def log_probs(model, params, data):
    """Return log π of the completions of a file, chosen and rejected, float64 `[rows, 2]`."""
    tokenizer = Tokenizer.load(model)
    apply, found = jax.jit(models.load(model).apply), []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            prompt = tokenizer.encode_prompt(row["prompt"])
            ids = [*prompt, *tokenizer.encode(row[side]), tokenizer.eos_id]
            padded = np.zeros((1, 40), np.int32)
            padded[0, : len(ids)] = ids
            logits = np.asarray(apply(params, padded), np.float64)[0]
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(sum(logs[i - 1, ids[i]] for i in range(len(prompt), len(ids))))
    return np.array(found).reshape(-1, 2)


def test_a_run(data, tmp_path, run):
    """At first both models agree: the loss is log 2. Then the chosen completions gain."""
    out = tmp_path / "out"
    done = run(*words(data, out, "--task", "dpo", *STEPS[:6]))
    assert done.status == 0, done.err
    steps = log.read(out / "log.jsonl")
    assert steps[0]["loss"] == pytest.approx(np.log(2)) and steps[-1]["loss"] < 0.6
    assert steps[-1]["margin"] > 0.1 and steps[-1]["accuracy"] > 0.5
    weights = ("chosen_reward", "rejected_reward", "tokens")
    assert {*weights} <= steps[0].keys() and (out / "reference.safetensors").exists()


@pytest.mark.slow
def test_the_figures_of_an_evaluation(tuned, data, model, run):
    """Loss, accuracy and margin of the merged model beside the base, by the formula."""
    base = models.load(model)
    overlay = peft.load(tuned / "adapter", base.params, base.naming)
    merged = lora_jax.merge(lora_jax.join(base.params, overlay))
    before, after = (log_probs(model, params, data) for params in (base.params, merged))
    rewards = 0.5 * (after - before)
    margins = rewards[:, 0] - rewards[:, 1]
    records = log.read(tuned / "log.jsonl")
    first, last = (r for r in records if "eval_loss" in r)
    assert first["eval_loss"] == pytest.approx(np.log(2)) and first["eval_accuracy"] == 0
    assert last["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    assert last["eval_margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert last["eval_accuracy"] == (margins > 0).mean() > 0.5
    for side, column in (("chosen", 0), ("rejected", 1)):
        wanted = rewards[:, column].mean()
        assert last[f"eval_{side}_reward"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(data, tmp_path, run):
    """To the bit, in losses and adapter, with the reference of its start."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    more = ("--task", "dpo", "--dropout", 0.1, *STEPS)
    assert run(*words(data, out, *more, "--steps", 2)).status == 0
    reference = (out / "reference.safetensors").read_bytes()
    done = run(*words(data, out, *more, "--resume"))
    assert done.status == 0 and "reference" not in done.err
    assert run(*words(data, whole, *more)).status == 0
    last = {r["step"]: r["loss"] for r in log.read(out / "log.jsonl") if "loss" in r}
    assert list(last.values()) == [r["loss"] for r in log.read(whole / "log.jsonl") if "loss" in r]
    assert (whole / "reference.safetensors").read_bytes() == reference
    for name, x in adapter(whole).items():
        np.testing.assert_array_equal(adapter(out)[name], x)
    other = run(*words(data, out, *more, "--beta", 1, "--resume"))
    assert other.status == 1 and "beta" in other.err


@pytest.mark.parametrize("name", ["start", "base"])
def test_whose_log_probabilities_are_the_reference(name, tmp_path, monkeypatch):
    asked = []

    def with_reference(of, params, part, *_):
        asked.append(params)
        return Data({**part.arrays, "reference": np.zeros((1, 2, 1), np.float32)})

    monkeypatch.setattr(module, "with_reference", with_reference)
    monkeypatch.setattr(module, "log_probs_of", lambda *_, **__: None)
    options = TrainOptions("m", [], tmp_path, task="dpo", reference=name)
    pairs = {"pairs": np.ones((1, 1), np.float32)}
    task = SimpleNamespace(data=Data(pairs), held_out=None, params="published")
    module.add_reference(options, None, task, SimpleNamespace(params="start", paths=()), print)
    assert asked == ["start" if name == "start" else "published"]


@pytest.mark.slow
def test_an_adapter_to_start_from(tuned, data, model, tmp_path, run):
    """The reference is the adapter itself, as in TRL, or the base."""
    more = ("--model", model, "--task", "dpo", "--beta", 0.5, "--eval", data)
    given = ["train", "--data", data, "--adapter", tuned / "adapter", "--length", 32, *more]
    for reference in ("start", "base"):
        out = tmp_path / reference
        done = run(*given, "--out", out, "--reference", reference, "--steps", 1)
        assert done.status == 0, done.err
    before = [r for r in log.read(tuned / "log.jsonl") if "eval_loss" in r][-1]
    assert losses(tmp_path / "start")[0] == pytest.approx(np.log(2))
    assert losses(tmp_path / "base")[0] == pytest.approx(before["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "orpo", "cpo", "simpo"])
def test_micro_batches_and_heads(task, data, tmp_path, run):
    """The same losses however rows are split or recomputed; a head that trains learns."""
    more = ("--task", task, *STEPS, "--batch", 4, "--no-shuffle")
    assert run(*words(data, tmp_path / "one", *more)).status == 0
    others = {
        "split": ("--batch", 2, "--accumulate", 2),
        "recomputed": ("--remat", "full"),
    }
    for name, other in others.items():
        assert run(*words(data, tmp_path / name, *more, *other)).status == 0
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert run(*words(data, tmp_path / "head", *more, "--train", "embed_tokens")).status == 0
    assert losses(tmp_path / "head")[-1] < losses(tmp_path / "head")[0]


@pytest.mark.slow
def test_files_with_weights(data, tmp_path, run):
    """Parts that are packed apart, with other numbers of pairs per row."""
    short = tmp_path / "short.jsonl"
    short.write_text(f"{json.dumps({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'})}\n" * 9)
    more = ("--task", "dpo", "--data", f"{short}=0.5", *STEPS)
    done = run(*words(data, tmp_path / "out", *more))
    assert done.status == 0, done.err
    assert losses(tmp_path / "out")[0] == pytest.approx(np.log(2))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_on_a_mesh(data, tmp_path, run):
    """The losses of one device."""
    more = ("--task", "dpo", *STEPS, "--batch", 4)
    assert run(*words(data, tmp_path / "one", *more)).status == 0
    done = run(*words(data, tmp_path / "mesh", *more, "--mesh", "fsdp=4,tensor=2"))
    assert done.status == 0, done.err
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_sweep_has_the_losses_of_train(data, tmp_path, run):
    more = ("--task", "dpo", *STEPS, "--lr", "3e-2", "--rank", 2)
    assert run(*words(data, tmp_path / "one", *more)).status == 0
    given = ["sweep", *words(data, tmp_path / "grid", small=())[1:], "--task", "dpo", *STEPS]
    given += ["--length", 32, "--batch", 2, "--targets", "q_proj,v_proj"]
    assert run(*given, "--ranks", "2,4", "--lrs", "3e-2").status == 0
    found = [
        r["loss"]
        for r in log.read(tmp_path / "grid" / "log.jsonl")
        if r.get("run") == "rank2-lr0.03" and "loss" in r
    ]
    wanted = [r["loss"] for r in log.read(tmp_path / "one" / "log.jsonl") if "loss" in r]
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "kind, more, message, status",
    [
        ("completion", (), "has completion rows, but preference tuning needs rows of the", 1),
        (
            "preference",
            ("--stream",),
            "--stream is for --task causal-lm, orpo, cpo, simpo; leave",
            1,
        ),
        ("preference", ("--task", "causal-lm"), "preference rows; use --task dpo or --task", 1),
        ("preference", ("--task", "orpo", "--reference", "base"), "is for --task dpo", 2),
        ("preference", ("--task", "causal-lm", "--beta", 1), "is for --task dpo or orpo or", 2),
        ("preference", ("--dpo-loss", "ipo", "--label-smoothing", 0.1), "is for --dpo-loss", 2),
        ("preference", ("--label-smoothing", 0.5), "must be from 0 to below 0.5", 2),
        ("preference", ("--beta", 0), "must be above 0", 2),
    ],
)
def test_what_is_refused(kind, more, message, status, tmp_path, fails):
    data = jsonl(tmp_path / "d.jsonl", kind)
    assert message in fails(*words(data, tmp_path / "out", "--task", "dpo", *more), status=status)
    assert not (tmp_path / "out").exists()


def test_the_losses_of_the_command_are_those_of_the_library():
    assert DpoName.__args__ == preference.KINDS
