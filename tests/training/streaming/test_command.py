"""`lora-jax train` on data that it reads while it trains."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

from lora_jax.cli import main
from lora_jax.cli.jobs.training import stream
from lora_jax.cli.train_options import TrainOptions
from lora_jax.training import log, run_record
from tests.cli.train.command import jsonl, words

CONSTANT = ("--schedule", "constant", "--warmup", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory of two files of conversations."""
    path = tmp_path_factory.mktemp("data")
    for name in ("a.jsonl", "b.jsonl"):
        jsonl(path / name, "chat", count=60)
    return path


@pytest.mark.slow
def test_a_run_streams_evaluates_and_says_so(folder, tmp_path, capfd):
    out = tmp_path / "out"
    more = ("--stream", "--eval-split", 0.2, "--eval-rows", 2, "--steps", 2, "--profile", 1)
    assert main(words(folder, out, *more)) == 0
    said = capfd.readouterr().err
    assert "note: the data is read while training (--no-stream reads it first)\n" in said
    assert "about " in said and " rows of 32 tokens, 2 steps of 2 rows" in said
    assert "steps 2 to 2 are profiled" in said
    records = log.read(out / "log.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 2]
    assert log.evaluations(records)[0]["eval_loss"] > 0
    assert run_record.recorded(out, "stream") is True
    first = json.loads((out / "rows-0.jsonl").read_text().splitlines()[0])
    assert len(first) == 4 and first[3] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "text", "txt", "preference"])
def test_a_resumed_run_streams_on(kind, tmp_path):
    """Without --stream, which the run records; a run of 2 and 3 more steps is a run of 5."""
    (tmp_path / "data").mkdir()
    if kind == "txt":
        (tmp_path / "data" / "a.txt").write_text("".join(f"line {i}\n" for i in range(900)))
    else:
        jsonl(tmp_path / "data" / "a.jsonl", kind, count=120)
    one, whole = tmp_path / "one", tmp_path / "whole"
    task = ("--task", "orpo") if kind == "preference" else ()
    data = tmp_path / "data" / "*"
    assert main(words(data, one, *CONSTANT, *task, "--steps", 2, "--stream")) == 0
    assert main(words(data, one, *CONSTANT, *task, "--steps", 5, "--resume")) == 0
    assert main(words(data, whole, *CONSTANT, *task, "--steps", 5, "--stream")) == 0
    found = [[*map(log.without_speed, log.read(out / "log.jsonl"))] for out in (one, whole)]
    assert found[0] == found[1]
    with (next((tmp_path / "data").iterdir())).open("a") as file:
        file.write('{"text": "more"}\n')
    assert main(words(data, one, *CONSTANT, "--steps", 6, "--resume")) == 1


def test_large_data_is_streamed(folder, tmp_path, monkeypatch):
    options = TrainOptions(model="tiny", data=[folder], out=tmp_path)
    chosen = lambda **more: (
        stream.choose_streaming(dataclasses.replace(options, **more), resumed=False).stream
    )
    assert chosen() is False and chosen(stream=True) is True
    monkeypatch.setattr(stream, "LARGE", 100)
    assert chosen() is True and chosen(stream=False) is False
    assert chosen(task="classification") is False
    assert chosen(data=[Path("missing")]) is False


def test_a_run_that_did_not_stream_does_not_when_resumed(tmp_path, folder, monkeypatch):
    """Runs of earlier releases record nothing about it."""
    monkeypatch.setattr(stream, "LARGE", 100)
    run_record.write(tmp_path, {"settings": {}, "base": {}, "data": {}})
    options = TrainOptions(model="tiny", data=[folder], out=tmp_path, resume=True)
    assert stream.choose_streaming(options, resumed=True).stream is False


def test_classification_is_refused(folder, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(words(folder, out, "--stream", "--task", "classification")) == 1
    assert (
        capfd.readouterr().err
        == "error: --stream is for --task causal-lm, orpo, cpo, simpo; leave it out\n"
    )
