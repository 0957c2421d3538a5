"""`lora-jax train --resume` with more steps, and which directories `--out` takes."""

import math

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.training import log, run_record
from tests.cli.train.command import words
from tests.cli.train.test_interrupted import CONSTANT, tensors


def without_seconds(out):
    records = log.read(out / "log.jsonl")
    return [log.without_speed(record) for record in records]


@pytest.fixture(scope="module")
def finished(play, tmp_path_factory):
    """Return the directory of a run of two steps."""
    from lora_jax.cli import main

    out = tmp_path_factory.mktemp("runs") / "two"
    assert main(words(play, out, "--steps", 2, "--warmup", 0)) == 0
    return out


@pytest.mark.slow
def test_more_steps_are_those_of_the_longer_run(play, tmp_path, run):
    """With a rate that does not depend on the length, a run of 2 and 2 more is a run of 4."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(*words(play, out, *CONSTANT, "--steps", 2)).status == 0
    done = run(*words(play, out, *CONSTANT, "--steps", 4, "--resume"))
    assert done.status == 0, done.err
    assert "resuming after step 2 of 2\n" in done.err
    assert "the run now has 4 steps: the learning rate is 3.0e-02 at step 3, and stays" in done.err
    assert run(*words(play, whole, *CONSTANT, "--steps", 4)).status == 0
    assert without_seconds(out) == without_seconds(whole)
    for name, x in tensors(whole).items():
        np.testing.assert_array_equal(tensors(out)[name], x)


@pytest.mark.slow
def test_the_schedule_is_that_of_the_longer_run(finished, play, run):
    """The cosine of four steps: 0.03 · (1 + cos(π·2/4)) / 2 at the third one, then less."""
    short = without_seconds(finished)
    done = run(*words(play, finished, "--warmup", 0, "--steps", 4, "--resume"))
    assert done.status == 0, done.err
    said = "the run now has 4 steps: the learning rate is 1.5e-02 at step 3, and falls to 0 after"
    assert said in done.err
    rates = [r["lr"] for r in without_seconds(finished)]
    cosine = [0.03 * (1 + math.cos(math.pi * step / 4)) / 2 for step in (2, 3)]
    assert rates[2:] == pytest.approx(cosine, rel=1e-5)
    assert without_seconds(finished)[:2] == short
    assert run_record.recorded(finished, "steps") == 4

    again = run(*words(play, finished, "--warmup", 0, "--resume"))  # as long as recorded
    assert again.status == 0 and "4 steps" in again.err
    assert "all 4 steps are done already; --steps N continues" in again.err
    assert len(without_seconds(finished)) == 4


def test_fewer_steps_than_done(finished, play, fails, run):
    done = run(*words(play, finished, "--warmup", 0, "--steps", 1, "--resume"))
    assert done.status == 1
    assert "steps already, more than --steps 1; request more steps" in done.err.splitlines()[-1]
    assert run_record.recorded(finished, "steps") > 1


def test_a_directory_of_other_files_is_refused(play, tmp_path, fails):
    """Before anything is loaded, and nothing is written."""
    (tmp_path / "data").mkdir()
    for name in ("d.txt", "a.txt", "c.txt", "b.txt"):
        (tmp_path / "data" / name).write_text("mine")
    before = {path: path.read_text() for path in (tmp_path / "data").iterdir()}
    for more in ((), ("--resume",)):
        error = fails(*words(play, tmp_path / "data", *more))
        assert "data: contains files that are not a run's (a.txt, b.txt, c.txt, ...); " in error
        assert "choose another --out" in error
    assert {path: path.read_text() for path in (tmp_path / "data").iterdir()} == before


def test_a_file_is_refused(play, fails):
    assert f"{play}: is not a directory; choose another --out" in fails(*words(play, play))


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / ".keep").touch()
    assert run_record.check_directory(tmp_path, resume=False) is False
    assert run_record.check_directory(tmp_path / "new", resume=True) is False


def test_a_run_is_refused_before_the_model_is_loaded(finished, play, fails, monkeypatch):
    from lora_jax.cli.jobs.training import train

    monkeypatch.setattr(train, "open_model", lambda *_: pytest.fail("loaded"))
    assert "already contains a run. Add --resume" in fails(*words(play, finished, "--warmup", 0))
