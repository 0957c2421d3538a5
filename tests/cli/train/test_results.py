"""What a finished `lora-jax train` says: files, the best adapter, and a command that works."""

import json
import shlex

import pytest

pytest.importorskip("typer")

from lora_jax.training import log
from tests.cli.train.command import jsonl, words


def said_next(out):
    """Return the command that a run ends with, with some text to give it."""
    (line,) = (line for line in out.splitlines() if line.startswith("next: lora-jax "))
    return shlex.split(line.removeprefix("next: lora-jax "))


def test_the_best_adapter_and_the_next_command(play, tmp_path, run, quick_compile):
    """A run that ends once its loss rises, and leaves the adapter before that."""
    out = tmp_path / "out"
    more = ("--eval-split", 0.25, "--eval-rows", 2, "--eval-every", 1, "--steps", 9)
    more += ("--patience", 1, "--load-best", "--report", "jsonl")
    done = run(*words(play, out, *more, "--lr", 3))  # too high: the loss rises again
    assert done.status == 0, done.err
    losses = {r["step"]: r["eval_loss"] for r in log.evaluations(log.read(out / "log.jsonl"))}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 1 < 9
    said = f"ended after step {best + 1} of 9: the held-out loss has not fallen in 1 evaluation"
    assert f"{said} (--patience)\n" in done.err
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses == {x["step"]: x["eval/loss"] for x in metrics if "eval/loss" in x}
    lowest = f"the one with the lowest held-out loss, after step {best}"
    assert f"wrote {out / 'adapter'}: {lowest}\nwrote {out / 'best'}: {lowest}\n" in done.out
    for file in (out / "best").iterdir():  # --load-best
        assert (out / "adapter" / file.name).read_bytes() == file.read_bytes()
    command = said_next(done.out)
    assert command[:5] == ["generate", "--model", "tiny", "--adapter", str(out / "best")]
    after = run(*command, "--max-tokens", 2)
    assert after.status == 0, after.err


def test_without_held_out_data_the_last_adapter_is_used(play, tmp_path, run, quick_compile):
    done = run(*words(play, tmp_path / "out", "--steps", 1, "--batch", 1))
    assert done.status == 0, done.err
    assert said_next(done.out)[4] == str(tmp_path / "out" / "adapter")
    assert "best" not in done.out
    assert f"wrote {tmp_path / 'out' / 'adapter'}: the adapter after step 1\n" in done.out
    assert ", 1 step of 1 row\n" in done.err


@pytest.mark.slow
def test_a_classifiers_next_command(tmp_path, run, quick_compile):
    data = jsonl(tmp_path / "d.jsonl", "label", count=10)
    done = run(*words(data, tmp_path / "out", "--task", "classification", "--steps", 1))
    assert done.status == 0, done.err
    command = said_next(done.out)
    assert command[0] == "predict" and command[4] == str(tmp_path / "out" / "adapter.safetensors")
    after = run(*command)
    assert after.status == 0, after.err


def test_nothing_but_steps_is_printed_without_a_terminal(play, tmp_path, run, quick_compile):
    """At most 110 columns, notes and paths aside."""
    done = run(*words(play, tmp_path / "out", "--steps", 12, "--log-every", 5))
    lines = done.err.splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == [
        f"step {step} of 12" for step in (1, 5, 10, 12)
    ]
    assert max(map(len, lines)) <= 110
