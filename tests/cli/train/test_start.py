"""What `lora-jax train` trains: from an adapter, in some layers, weights fully, biases."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("typer")

import lora_jax as lora
from lora_jax import peft
from lora_jax.cli import main
from lora_jax.cli.jobs.training.model import open_model
from lora_jax.files.disk import safetensors_file
from lora_jax.training import log
from lora_jax.training.batching import cut_stream
from lora_jax.training.loop import measure
from lora_jax.training.loss import language_sums
from tests.cli import files
from tests.cli.train.command import TEXT, jsonl, words

BARE = ("--length", 32, "--batch", 2, "--lr", "3e-2")
HELD_OUT = ("--eval-split", 0.25, "--eval-rows", 4)


def evaluations(out):
    return log.evaluations(log.read(out / "log.jsonl"))


def peft_config(out, name="adapter"):
    return json.loads((out / name / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def first(play, tmp_path_factory):
    """Return the directory of a run of four steps."""
    out = tmp_path_factory.mktemp("first") / "run"
    assert main(words(play, out, *HELD_OUT, "--steps", 4, "--alpha", 6)) == 0
    return out


@pytest.fixture(
    scope="module", params=["peft", pytest.param("mlx", marks=pytest.mark.slow), "native"]
)
def adapter(request, first, tmp_path_factory):
    """Return the same adapter in every format."""
    if request.param == "peft":
        return first / "adapter"
    out = tmp_path_factory.mktemp("formats") / "adapter.safetensors"
    command = ["convert", first / "adapter", "--to", request.param, "--out", out, "--model", "tiny"]
    assert main([str(word) for word in command]) == 0
    return out


def test_training_starts_from_an_adapter(adapter, first, play, tmp_path, run):
    """The first evaluation is the last one of the run that wrote it."""
    out = tmp_path / "out"
    done = run(*words(play, out, *HELD_OUT, "--steps", 1, "--adapter", adapter, small=BARE))
    assert done.status == 0, done.err
    start, end = evaluations(out)
    assert start["eval_loss"] == pytest.approx(evaluations(first)[-1]["eval_loss"], rel=1e-5)
    assert end["eval_loss"] != start["eval_loss"]
    config = peft_config(out)
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert config["target_modules"] == peft_config(first)["target_modules"]


def test_options_of_new_adapters_are_refused_beside_an_adapter(first, play, tmp_path, fails):
    more = ("--adapter", first / "adapter", "--rank", 4, "--dora")
    error = fails(*words(play, tmp_path / "out", *more, small=BARE), status=2)
    assert "--adapter decides what trains, and how; leave out --rank, --dora;" in error


def test_a_model_is_not_an_adapter(play, tmp_path, fails):
    model = files.model(tmp_path / "model")
    error = fails(*words(play, tmp_path / "out", "--adapter", model, small=BARE))
    assert "model: a model checkpoint, not an adapter" in error


def test_another_adapter_cannot_resume(first, play, tmp_path, run, fails):
    given = ("--steps", 1)
    one, other = (("--adapter", first / name) for name in ("adapter", "other"))
    tensors, metadata = safetensors_file.read(first / "adapter" / "adapter_model.safetensors")
    (first / "other").mkdir()
    changed = {name: x * 2 for name, x in tensors.items()}
    safetensors_file.write(first / "other" / "adapter_model.safetensors", changed, metadata)
    (first / "other" / "adapter_config.json").write_text(json.dumps(peft_config(first)))
    assert run(*words(play, tmp_path / "out", *given, *one, small=BARE)).status == 0
    again = words(play, tmp_path / "out", *given, *other, "--resume", small=BARE)
    assert "the checksum of --adapter was" in fails(*again)


@pytest.mark.slow
def test_a_classifier_starts_from_a_classifier(tmp_path, run, fails, quick_compile):
    """The first accuracy is the last one of the run before; other labels are refused."""
    data = jsonl(tmp_path / "d.jsonl", "label", count=40)
    task = ("--task", "classification", "--eval-split", 0.2)
    assert run(*words(data, tmp_path / "one", *task, "--epochs", 2)).status == 0
    adapter = tmp_path / "one" / "adapter.safetensors"
    given = ("--adapter", adapter, "--steps", 1)
    done = run(*words(data, tmp_path / "two", *task, *given, small=BARE))
    assert done.status == 0, done.err
    before, after = evaluations(tmp_path / "one")[-1], evaluations(tmp_path / "two")[0]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-4)

    rows = "".join(json.dumps({"text": f"x {i}", "label": f"L{i % 2}"}) + "\n" for i in range(40))
    other = tmp_path / "other.jsonl"
    other.write_text(rows)
    error = fails(*words(other, tmp_path / "three", *task, *given, small=BARE))
    assert "trained on the labels [0, 1], but the data has ['L0', 'L1']" in error
    text = jsonl(tmp_path / "text.jsonl", "text")
    error = fails(*words(text, tmp_path / "four", *given, small=BARE))
    assert "a classifier's adapter; add --task classification" in error


def test_a_classifier_starts_from_a_language_models_adapter(first, tmp_path, run, quick_compile):
    """The encoder has the adapter, and the head is new."""
    data = jsonl(tmp_path / "d.jsonl", "label", count=40)
    given = ("--task", "classification", "--adapter", first / "adapter", "--steps", 2)
    done = run(*words(data, tmp_path / "out", *given, small=BARE))
    assert done.status == 0, done.err
    layouts = lora.read_metadata(tmp_path / "out" / "adapter.safetensors")["layouts"]
    assert layouts["head/kernel"] == {"kind": "whole"}
    named = {path for path in layouts if path.startswith("encoder/")}
    assert len(named) == 4 and all("query" in path or "value" in path for path in named)


#: Options, and the modules that train then, of two layers with seven projections each.
CHOICES = {
    "last": (("--targets", "q_proj,v_proj", "--layers", "-1"), ["1.q", "1.v"]),
    "slice": (("--targets", "q_proj", "--layers", "-1:"), ["1.q"]),
    "range": (("--targets", "q_proj", "--layers", "0-1"), ["0.q", "1.q"]),
    "stacked": (("--targets", "q_proj,o_proj", "--layers", "1", "--scan"), ["1.o", "1.q"]),
    "exclude": (("--targets", "self_attn", "--exclude", "k_proj,layer_0"), ["1.o", "1.q", "1.v"]),
}


# Other ways to write the layers, which tests of patterns have too.
SLOW = ("slice", "range", "stacked", "exclude")


@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in CHOICES]
)
def test_layers_and_exclusions(name, play, tmp_path, run, quick_compile):
    more, expected = CHOICES[name]
    done = run(*words(play, tmp_path / "out", "--steps", 1, "--rank", 2, *more, small=BARE))
    assert done.status == 0, done.err
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors, _ = safetensors_file.read(file)
    prefix, ending = "base_model.model.model.layers.", "_proj.lora_A.weight"
    found = [n for n in tensors if n.endswith(ending)]
    short = [n.removeprefix(prefix).removesuffix(ending).replace("self_attn.", "") for n in found]
    assert sorted(short) == expected


@pytest.mark.slow
def test_a_head_that_is_fully_trained(play, tmp_path, run, quick_compile):
    """The embedding of this model is its head too: rows of bytes that are not in the text move.

    Only the softmax over all outputs reaches these rows, so a loss that takes the head for frozen
    would leave them as they are. The file holds what was measured.
    """
    out = tmp_path / "out"
    more = (*HELD_OUT, "--steps", 3, "--targets", "q_proj", "--train", "embed_tokens,norm")
    done = run(*words(play, out, *more, small=BARE))
    assert done.status == 0, done.err
    assert set(peft_config(out)["modules_to_save"]) == {"model.embed_tokens", "model.norm"}
    model = open_model("tiny", "float32", scan=False)
    adapters = peft.load(out / "adapter", model.params, model.naming)
    merged = lora.merge(lora.join(model.params, adapters))
    ids = np.asarray(model.tokenizer.encode(TEXT), np.int32)
    unseen = sorted({*range(256)} - {*ids.tolist()})
    before, after = (
        np.asarray(p["embedding"]["embedding"])[unseen] for p in (model.params, merged)
    )
    assert len(unseen) > 200 and (np.abs(after - before).max(axis=1) > 1e-3).all()
    held_out = cut_stream(ids[len(ids) - round(len(ids) / 4) :], 32).first(4)
    loss = jax.jit(language_sums(model.apply))
    found = measure(lambda a, base, batch: loss(a, batch), merged, None, held_out, 2)
    assert found["eval_loss"] == pytest.approx(evaluations(out)[-1]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "bias", [pytest.param(x, marks=pytest.mark.slow) for x in ("adapted", "all")]
)
def test_biases(bias, tmp_path, run, quick_compile):
    files.encoder(tmp_path / "bert")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"text": "a {i}", "label": {i % 2}}}\n' for i in range(10)))
    command = ["train", "--model", tmp_path / "bert", "--data", data, "--out", tmp_path / "out"]
    more = ["--task", "classification", "--targets", "query", "--bias", bias, "--steps", 1]
    assert run(*command, *more, "--length", 16, "--rank", 2).status == 0
    layouts = lora.read_metadata(tmp_path / "out" / "adapter.safetensors")["layouts"]
    biases = {path for path in layouts if path.endswith("/bias")} - {"head/bias"}
    kernels = {path for path in layouts if layouts[path]["kind"] != "whole"}
    beside = {path.removesuffix("kernel") + "bias" for path in kernels}
    assert beside and (biases == beside if bias == "adapted" else biases > beside)


MISTAKES = {
    "exclude nothing": (("--exclude", "q_prj"), "--exclude: no module is called 'q_prj'; choose"),
    "exclude all": (
        ("--targets", "q_proj", "--exclude", "q_proj"),
        "leaves no module of --targets",
    ),
    "train": (("--train", "norms"), "--train: no module is called 'norms'; choose from norm"),
    "tied": (("--train", "lm_head"), "choose from embed_tokens, which is the head too"),
    "twice": (("--targets", "q_proj", "--train", "q_proj"), "in --targets and in --train; choose"),
    "layer": (("--layers", "9"), "--layers '9' selects no target; the targets are in layers 0, 1"),
    "layers": (("--layers", "last"), "--layers 'last': give numbers such as 0,1,-1, ranges"),
    "backwards": (("--layers", "3-1"), "--layers '3-1': give numbers"),
    "bias": (("--bias", "all"), "--bias all: the model has no biases"),
    "rank": (("--rank", "100000"), "--rank 100000 is above what the weight"),
    "odd": (("--init", "orthogonal", "--rank", "3"), "--init orthogonal needs an even rank"),
    "empty": (("--targets", ","), "--targets: is empty; name modules, or all-linear"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_the_words_of_the_command_line(name, play, tmp_path, fails):
    more, said = MISTAKES[name]
    error = fails(*words(play, tmp_path / "out", *more, small=BARE))
    assert said in error
    for python in ("exclude=", "train=", "targets=", "layers=", "overrides", "Override(", '="'):
        assert python not in error
    assert not (tmp_path / "out").exists()
