"""`lora-jax sweep` and Ctrl-C, a kill, `--resume` and `--halving`: the same numbers to the bit."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log
from lora_jax.training.sweeping import progress
from tests.cli.sweep.command import of_run, records_of, words

WAVES = ("--ranks", "1,2", "--lrs", "3e-2,1e-2", "--slots", 2, "--steps", 4, "--report", "jsonl")
HALVING = (
    *("--ranks", "1,2", "--lrs", "3e-2,1e-2,1e-3", "--slots", 3, "--steps", 6),
    *("--halving", "--eta", 2, "--eval-split", 0.25, "--eval-rows", 2),
)


def tensors(out):
    """Every adapter by name."""
    found = sorted(out.glob("rank*/adapter/adapter_model.safetensors"))
    return {path.parts[-3]: safetensors_file.read(path)[0] for path in found}


def assert_same(one, other):
    assert records_of(one) == records_of(other)
    mine, its = tensors(one), tensors(other)
    assert mine.keys() == its.keys() and its
    for name, run in its.items():
        for key, x in run.items():
            np.testing.assert_array_equal(mine[name][key], x)
    mine, its = ([*sorted(out.glob("rank*/metrics.jsonl"))] for out in (one, other))
    assert [path.read_text() for path in mine] == [path.read_text() for path in its]
    results = [json.loads((out / "results.json").read_text()) for out in (one, other)]
    for found in results:
        for run in found["runs"]:
            run.pop("adapter")
    assert results[0] == results[1]


@pytest.fixture
def interrupted_at(monkeypatch):
    """Return a function that makes Ctrl-C come while a step is shown."""

    def at(step):
        def lines(say, total, every):
            def show(records):
                if records[0]["step"] == step and "seconds" in records[0]:
                    os.kill(os.getpid(), signal.SIGINT)

            return show

        monkeypatch.setattr(progress, "lines", lines)

    return at


@pytest.fixture(scope="module")
def whole(play, tmp_path_factory):
    """Return the directories of sweeps that nothing interrupted, by their options."""
    from lora_jax.cli import main

    found = {}
    for more in (WAVES, HALVING):
        found[more] = tmp_path_factory.mktemp("whole") / "out"
        assert main(words(play, found[more], *more)) == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [WAVES, HALVING], ids=["waves", "halving"])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_an_interrupted_sweep_continues(more, step, whole, play, tmp_path, run, interrupted_at):
    """Ctrl-C within a stretch, before its end and in a later one; all adapters so far are there."""
    out = tmp_path / "out"
    interrupted_at(step)
    done = run(*words(play, out, *more))
    assert done.status == 130
    last = log.read(out / "log.jsonl")[-1]["step"]
    error = done.err.splitlines()[-1]
    assert error.startswith(f"error: interrupted: step {last} is saved, with the adapters so far")
    assert error.endswith("--resume") and "lora-jax sweep " in error
    begun = {r["run"] for r in log.read(out / "log.jsonl") if "loss" in r}
    assert tensors(out).keys() == begun
    assert (out / "losses.png").exists() and (out / "results.json").exists()
    interrupted_at(-1)
    resumed = run(*words(play, out, *more, "--resume"))
    assert resumed.status == 0, resumed.err
    assert_same(out, whole[more])


@pytest.mark.slow
def test_a_killed_sweep_continues(whole, play, tmp_path, run):
    """Killed at once in the second wave, it goes on from its last checkpoint."""
    out = tmp_path / "out"
    command = words(play, out, *WAVES, "--save-every", 3, "--log-every", 1)
    with subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        while "step 7" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] in "36"
    assert run(*command, "--resume").status == 0
    assert_same(out, whole[WAVES])


@pytest.mark.slow
def test_halving_stops_losers(whole):
    """The best that came so far go on; a run that was stopped has its adapter, and its place."""
    out = whole[HALVING]
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {one["state"] for one in runs} == {"done", "stopped"}
    records = log.read(out / "log.jsonl")
    first = {r["run"]: r["eval_loss"] for r in records if "eval_loss" in r and r["run_step"] == 2}
    assert len(first) == 6  # each was judged after two of six steps
    for one in runs:
        assert one["steps"] in (2, 3, 6) and (out / one["name"] / "adapter").exists()
        assert (one["steps"] == 6) == (one["state"] == "done")
    came = list(first)
    best_of_first = min(came[:3], key=first.get)
    assert next(one for one in runs if one["name"] == best_of_first)["steps"] > 2


@pytest.mark.slow
def test_a_run_that_diverges_leaves_the_others_alone(play, tmp_path, run):
    """Its losses are no numbers after the first step; the other's are those without it."""
    out = tmp_path / "out"
    more = ("--lrs", "3e-2,1e38", "--ranks", 1, "--clip", 0, "--steps", 4)
    done = run(*words(play, out, *more, "--save-every", 2))
    assert done.status == 0, done.err
    assert "rank1-lr1e38: diverged at step" in done.err and "diverged" in done.out
    alone = tmp_path / "alone"
    assert run(*words(play, alone, *more, "--lrs", "3e-2")).status == 0
    mine, its = (of_run(path, "rank1-lr0.03") for path in (out, alone))
    np.testing.assert_allclose(mine, its, rtol=3e-6)
    assert len(of_run(out, "rank1-lr1e38")) < len(mine) == 4
    assert tensors(out).keys() == {"rank1-lr0.03"}
    found = json.loads((out / "results.json").read_text())
    assert found["best"] == "rank1-lr0.03" and found["runs"][1]["loss"] is None

    lost = run(*words(play, tmp_path / "lost", *more, "--lrs", "1e38"))
    assert lost.status == 1 and "diverged" in lost.out
    error = lost.err.splitlines()[-1]
    assert error.startswith("error: all runs diverged; lower the learning rates (--lrs)")
    assert json.loads((tmp_path / "lost" / "results.json").read_text())["best"] is None
