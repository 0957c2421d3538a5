"""Which names of base models are found, and which are written into adapters."""

import itertools
import json
import pathlib

import pytest

pytest.importorskip("typer")

from lora_jax.cli.jobs.training.results import base_name
from lora_jax.cli.train_options import TrainOptions
from tests.cli.train.command import words


@pytest.mark.parametrize("command", ["train", "generate", "merge"])
def test_a_name_of_the_hub_says_how_to_fetch_it(command, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {
        "train": ["--data", "a.txt", "--out", "out"],
        "generate": ["--prompt", "x"],
        "merge": ["--adapter", "a", "--out", "out"],
    }[command]
    error = fails(command, "--model", "meta-llama/Llama-3.2-1B", *more)
    assert "models of the Hugging Face Hub are not downloaded" in error
    fetch = "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B"
    assert f"Fetch it with '{fetch}', then give --model Llama-3.2-1B" in error


def test_a_path_is_not_a_name_of_the_hub(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/llama", "./a/b", "/none/here", "a/b/c", "nowhere"):
        error = fails("generate", "--model", name, "--prompt", "x")
        assert f"{name}: no such file or directory" in error and "hf download" not in error


def options(model, **more):
    return TrainOptions(str(model), [pathlib.Path("a.txt")], pathlib.Path("out"), **more)


def test_names_that_others_can_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "4e20de3"
    plain = tmp_path / "mine"
    for directory in (cached, plain):
        directory.mkdir(parents=True)
    assert base_name(options("smollm2")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name(options(cached)) == "meta-llama/Llama-3.2-1B"
    assert base_name(options("mine")) == str(plain)
    assert base_name(options("tiny")) == "tiny"
    for model in ("smollm2", cached, "mine"):
        assert base_name(options(model, base_name="me/model")) == "me/model"


def test_the_name_is_written(play, tmp_path, run, quick_compile):
    out = tmp_path / "out"
    assert run(*words(play, out, "--steps", 1, "--base-name", "me/model")).status == 0
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/model"


def test_examples_of_the_help_name_no_model_that_does_not_exist(run):
    """A model is one that is built in, a path, or the reader's own."""
    for command in ("train", "generate", "merge", "convert"):
        for line in run(command, "--help").out.splitlines():
            given = line.strip().split()
            if given[:1] != ["lora-jax"]:
                continue
            for option, value in itertools.pairwise(given):
                if option in ("--model", "-m"):
                    is_own = value.startswith(("./", "my-"))
                    assert value in ("smollm2", "tiny") or is_own, line
