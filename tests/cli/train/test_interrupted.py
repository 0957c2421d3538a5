"""`lora-jax train` and Ctrl-C: what is said, what is left, and how the process ends."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log, progress
from tests.cli.train.command import words

CONSTANT = ("--schedule", "constant", "--warmup", 0)


def tensors(out):
    return safetensors_file.read(out / "adapter" / "adapter_model.safetensors")[0]


@pytest.fixture
def interrupted_at(monkeypatch):
    """Return a function that makes Ctrl-C come while a step is shown."""

    def at(step):
        def lines(say, steps, every):
            def show(record):
                if record["step"] == step:
                    os.kill(os.getpid(), signal.SIGINT)

            return show

        monkeypatch.setattr(progress, "lines", lines)

    return at


def test_an_interrupted_run_leaves_its_adapter(play, tmp_path, run, interrupted_at):
    """The adapter is that of a run with as many steps, to the bit."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*words(play, whole, *CONSTANT, "--steps", 3)).status == 0
    interrupted_at(2)
    done = run(*words(play, out, *CONSTANT, "--steps", 5))
    assert done.status == 130
    asked, error = done.err.splitlines()[-2:]
    assert asked == "finishing the steps under way, then saving; Ctrl-C again stops at once"
    step = log.read(out / "log.jsonl")[-1]["step"]
    assert error.startswith(f"error: interrupted: step {step} of 5 is saved, with its adapter in")
    assert error.endswith("--resume") and str(out / "adapter") in error
    assert step == 3  # which was dispatched before step 2 was read
    one, other = tensors(out), tensors(whole)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert (out / "loss.png").exists()


@pytest.mark.slow
def test_every_checkpoint_leaves_its_adapter(play, tmp_path, run, monkeypatch):
    """A run that is killed later has that of its last checkpoint."""
    out, seen = tmp_path / "out", []

    def lines(say, steps, every):
        def show(record):
            file = out / "adapter" / "adapter_model.safetensors"
            seen.append((record["step"], file.exists()))

        return show

    monkeypatch.setattr(progress, "lines", lines)
    assert run(*words(play, out, "--steps", 3, "--save-every", 2)).status == 0
    assert seen == [(1, False), (2, False), (3, True)]


def test_a_second_ctrl_c_while_the_first_step_compiles(play, tmp_path):
    """Nothing waits for the compiler, and the process does not crash."""
    command = words(play, tmp_path / "out", "--steps", 9, "--length", 512, "--rank", 4)
    with subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "trainable" not in process.stderr.readline():
            assert process.poll() is None
        while not (tmp_path / "out" / "checkpoints").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("finishing the step")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert said.startswith(
        "error: interrupted at once: no step is saved; to resume: lora-jax train"
    )
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0.0, 0.3, 0.8])
def test_a_second_signal_at_any_time(number, wait, play, tmp_path):
    command = words(play, tmp_path / "out", "--steps", 4000, "--length", 512)
    with subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        while "trainable" not in process.stderr.readline():
            assert process.poll() is None
        while not (tmp_path / "out" / "checkpoints").exists():
            assert process.poll() is None
        time.sleep(wait)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 130 and said.splitlines()[-1].startswith("error: interrupted")
