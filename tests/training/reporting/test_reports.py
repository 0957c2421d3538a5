"""What `--report` writes, beside the log; Weights & Biases by a module in its place."""

import json
import sys
import types

import pytest

pytest.importorskip("typer")

from lora_jax.cli.jobs.training.reports import Reports
from lora_jax.training import log
from lora_jax.training.errors import TrainingError
from lora_jax.training.reporting.reporters import require
from tests.cli.conftest import *  # noqa: F403
from tests.cli.train.command import words
from tests.training.reporting import events

STEP = {"step": 1, "loss": 2.5, "tokens": 30, "lr": 1e-3, "gradient_norm": 0.5, "seconds": 0.1}
EVAL = {"step": 1, "eval_loss": 2.0, "perplexity": 7.5, "eval_seconds": 0.1}
NUMBERS = {
    **{"train/loss": 2.5, "train/tokens": 30, "train/learning_rate": 1e-3},
    **{"train/gradient_norm": 0.5, "eval/loss": 2.0, "eval/perplexity": 7.5},
}


class Runs:
    """The part of `wandb` that is used: https://docs.wandb.ai/ref/python/sdk/functions/init."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0

    def module(self):
        made = types.ModuleType("wandb")
        made.init, made.Settings = self.init, lambda **given: given
        return made

    def init(self, **given):
        self.inits.append(given)
        return self

    def log(self, numbers, step):
        self.logged += [(step, name, value) for name, value in numbers.items()]

    def finish(self):
        self.finished += 1


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    monkeypatch.setitem(sys.modules, "wandb", found.module())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return found


def report(names, folder, records, done=0):
    said = []
    reports = Reports(names, folder, {"rank": 2}, said.append)
    reports.start(done)
    for record in records:
        reports.report(record)
    reports.close()
    assert not said
    return reports


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_writes_each_step_once(tmp_path):
    later = [{**STEP, "step": n} for n in (2, 3)]
    report(["jsonl"], tmp_path, [STEP, EVAL, *later])
    assert written(tmp_path)[0] == {"step": 1, **{k: x for k, x in NUMBERS.items() if "train" in k}}
    assert written(tmp_path)[1] == {"step": 1, "eval/loss": 2.0, "eval/perplexity": 7.5}
    report(["jsonl"], tmp_path, later[1:], done=2)
    assert [line["step"] for line in written(tmp_path)] == [1, 1, 2, 3]


def test_tensorboard(tmp_path):
    """One file per process; a resumed one tells TensorBoard to forget the steps after `done`."""
    pytest.importorskip("tensorboardX")
    report(["tensorboard"], tmp_path, [STEP, EVAL])
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {tag: value for step, tag, value in events.read(file) if step == 1}
    assert found == pytest.approx(NUMBERS)
    report(["tensorboard"], tmp_path, [{**STEP, "step": 5}], done=4)
    (other,) = set((tmp_path / "tensorboard").iterdir()) - {file}
    assert {step for step, *_ in events.read(other)} == {5}
    assert (events.restarts(file), events.restarts(other)) == ([], [5])


def test_weights_and_biases(tmp_path, runs, monkeypatch):
    report(["wandb"], tmp_path / "run", [STEP, EVAL])
    assert runs.finished == 1 and {step for step, *_ in runs.logged} == {1}
    assert {name: value for _, name, value in runs.logged} == NUMBERS
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    report(["wandb"], tmp_path / "run", [], done=1)
    first, again = runs.inits
    assert (first["project"], again["project"]) == ("lora-jax", "mine")
    assert (first["resume"], again["resume"]) == ("never", "allow") and first["id"] == again["id"]
    assert (first["name"], first["config"]) == ("run", {"rank": 2})
    report(["wandb"], tmp_path / "other", [])
    assert runs.inits[2]["id"] != first["id"]


def test_a_tool_that_fails_does_not_end_the_run(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(runs, "log", lambda *_, **__: 1 / 0)
    said = []
    reports = Reports(["wandb", "jsonl"], tmp_path, {}, said.append)
    reports.start(0)
    for _ in range(2):
        reports.report(STEP)
    reports.close()
    wanted = "note: --report wandb failed (division by zero); the run continues without it"
    assert said == [wanted] and len(written(tmp_path)) == 2


def test_a_tool_that_is_not_installed(monkeypatch):
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(TrainingError) as raised:
            require(name)
        how = f"--report {name} needs the package {package}; pip install 'lora-jax[{name}]'"
        assert str(raised.value) == how
    require("jsonl")


@pytest.mark.slow
def test_a_run_reports_what_its_log_says(play, tmp_path, run, runs, quick_compile):
    more = ("--steps", 2, "--eval-split", 0.2, "--eval-rows", 2, "--report", "jsonl")
    done = run(*words(play, tmp_path / "out", *more, "--report", "wandb"))
    assert done.status == 0, done.err
    records = log.read(tmp_path / "out" / "log.jsonl")
    lines = written(tmp_path / "out")
    assert (
        [line["step"] for line in lines] == [record["step"] for record in records] == [0, 1, 2, 2]
    )
    for line, record in zip(lines, records, strict=True):
        if "loss" in record:
            names = ("train/loss", "train/learning_rate", "train/gradient_norm")
            assert [line[n] for n in names] == [record[n] for n in ("loss", "lr", "gradient_norm")]
        else:
            assert line["eval/loss"] == record["eval_loss"]
    assert lines[2]["train/tokens_per_second"] > 0
    assert runs.logged == [(x["step"], n, v) for x in lines for n, v in x.items() if n != "step"]
    assert runs.inits[0]["config"]["lr"] == 3e-2 and runs.finished == 1
