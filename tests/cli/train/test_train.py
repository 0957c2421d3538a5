"""`lora-jax train` on a random model of a hundred thousand parameters."""

import dataclasses
import json
import pathlib
import shlex
import signal
import string
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("typer")

import lora_jax as lora
from lora_jax import peft
from lora_jax.cli import main
from lora_jax.cli.jobs.training import train as run_train
from lora_jax.cli.jobs.training.model import open_model
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.training import log
from lora_jax.training.batching import cut_stream
from lora_jax.training.loop import measure
from lora_jax.training.loss import language_sums
from tests.cli.train.command import TEXT, jsonl, words


@pytest.fixture(scope="module")
def trained(play, tmp_path_factory):
    """Return the directory of a complete run, and the command that made it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    command = words(play, out, "--eval-split", 0.25, "--eval-rows", 4)
    command += ["--steps", "5", "--eval-every", "2"]
    assert main(command) == 0
    return out, command


def test_what_a_run_leaves(trained):
    out, _ = trained
    records = log.read(out / "log.jsonl")
    assert [r["step"] for r in log.evaluations(records)] == [0, 2, 4, 5]
    perplexities = [r["perplexity"] for r in log.evaluations(records)]
    assert perplexities[-1] < 0.8 * perplexities[0]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"]) == (2, "CAUSAL_LM")
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    assert (out / "best" / "adapter_model.safetensors").exists()


def test_the_adapter_is_what_was_measured(trained):
    """Read back from PEFT's files, adapted and merged, on a base that is not scanned."""
    out, _ = trained
    model = open_model("tiny", "float32", scan=False)
    adapters = peft.load(out / "adapter", model.params, model.naming)
    merged = lora.merge(lora.join(model.params, adapters))
    ids = np.asarray(model.tokenizer.encode(TEXT), np.int32)
    held_out = cut_stream(ids[len(ids) - round(len(ids) / 4) :], 32).first(4)
    loss = jax.jit(language_sums(model.apply))
    found = measure(lambda a, base, batch: loss(a, batch), merged, None, held_out, 2)
    last = log.evaluations(log.read(out / "log.jsonl"))[-1]
    assert found["perplexity"] == pytest.approx(last["perplexity"], rel=1e-4)


def test_the_table(trained, run, tmp_path):
    """A finished run is resumed without a step, so the table shows the log."""
    out, command = trained
    done = run(*command, "--resume")
    assert done.status == 0
    first, *_, last = (r["perplexity"] for r in log.evaluations(log.read(out / "log.jsonl")))
    assert f"{first:.2f} → {last:.2f}" in done.out and str(out / "adapter") in done.out
    assert "5 steps of 2 rows" in done.err


def test_another_run_in_its_place(trained, fails):
    _, command = trained
    assert "already contains a run. Add --resume" in fails(*command)
    changed = [word if word != "3e-2" else "1e-2" for word in command]
    assert "was started with different settings" in fails(*changed, "--resume")
    assert "lr was 0.03, now 0.01" in fails(*changed, "--resume")


def test_another_order_in_its_place(trained, fails):
    _, command = trained
    assert "shuffle was true, now false" in fails(*command, "--resume", "--no-shuffle")


@pytest.fixture
def job_of(monkeypatch, run):
    """Return the job that a command would train, without training it."""

    class Begun(lora.LoraError):
        pass

    def train(job, *_):
        raise Begun(jobs.append(job))

    def call(*command):
        assert run(*command).status == 1
        return jobs.pop()

    jobs = []
    monkeypatch.setattr(run_train, "train", train)
    return call


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_rows_in_the_files_order(task, tmp_path, job_of):
    """Texts of several lengths; held-out rows are packed the same way, shuffled or not."""
    data = tmp_path / "d.jsonl"
    texts = [chr(97 + i) * (1 + 5 * i % 12) for i in range(20)]
    keys = ("text", "label") if task == "classification" else ("prompt", "completion")
    rows = [dict(zip(keys, (text, "01"[i % 2]), strict=True)) for i, text in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shuffled, plain = (
        job_of(*words(data, tmp_path / more, "--eval-split", 0.3, "--task", task, more))
        for more in ("--shuffle", "--no-shuffle")
    )
    assert shuffled.settings.shuffle and not plain.settings.shuffle
    for name, x in shuffled.held_out.arrays.items():
        np.testing.assert_array_equal(plain.held_out.arrays[name], x)
    x = plain.data.arrays
    read = byte_tokenizer().decode(x["ids"][x["segments"] > 0].tolist())
    letters = [letter for letter in read if letter in string.ascii_lowercase]
    assert letters == sorted(letters) and len(set(letters)) == 14


def test_a_classifier(tmp_path, run, quick_compile):
    data = jsonl(tmp_path / "d.jsonl", "label", count=40)
    command = words(data, tmp_path / "out", "--task", "classification", "--eval-split", 0.2)
    done = run(*command, "--epochs", 4)
    assert done.status == 0, done.err
    evaluated = log.evaluations(log.read(tmp_path / "out" / "log.jsonl"))
    assert evaluated[-1]["eval_accuracy"] == 1.0
    header = lora.read_metadata(tmp_path / "out" / "adapter.safetensors")
    assert header["metadata"]["labels"] == [0, 1]
    assert header["layouts"]["head/kernel"] == {"kind": "whole"}


ERRORS = {
    "no model": (["--model", "nowhere"], "nowhere: no such file or directory; give"),
    "no target": (["--targets", "q_prj"], "no module is called 'q_prj'; choose from q_proj"),
    "no rows": (["--length", 4096], "--length 4096: must be from 2 to 1024"),
    "no encoding": (["--encoding", "x"], "unknown encoding 'x'"),
    "a share": (["--eval-split", 0.0001], "--eval-split 0.0001 leaves a part without a token"),
    "labels": (["--task", "classification"], "has stream rows, but a classifier needs"),
    "rank": (["--rank", 100], "rank 100 is above what the weight"),
    "missing": (["--eval", "none.txt"], "cannot read none.txt: No such file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_failures_are_one_line_and_leave_nothing(name, play, tmp_path, fails):
    more, said = ERRORS[name]
    assert said in fails(*words(play, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_files_of_several_kinds(play, tmp_path, fails):
    data = jsonl(tmp_path / "d.jsonl", "chat")
    error = fails(*words(data, tmp_path / "out", "--eval", play))
    assert (
        f"files of several kinds: {data} contains chat rows, {play} contains stream rows" in error
    )


def test_mistakes_on_the_command_line(play, tmp_path, fails):
    both = ["--eval", play, "--eval-split", 0.1]
    assert "--eval or --eval-split" in fails(*words(play, tmp_path, *both), status=2)
    assert "--task" in fails(*words(play, tmp_path, "--task", "poetry"), status=2)


def test_the_command_that_goes_on(monkeypatch, run):
    """The resume command parses to the same options, and --resume."""
    said = []
    monkeypatch.setattr(run_train, "main", lambda *given: said.append(given))
    first = words("a b.txt", "run", "--data", "c.txt", "--eval", "d.txt", "--eval", "e.txt")
    first += ["--task", "classification", "--dtype", "bfloat16", "--scan", "--no-shuffle"]
    first += ["--dora", "--steps", "7", "--alpha", "3.5", "--lora-plus", "16", "--init", "olora"]
    assert run(*first).status == 0
    assert run(*shlex.split(said[0][1])[1:]).status == 0
    (options, command), again = said
    assert again == (dataclasses.replace(options, resume=True), command)
    assert options.data == [pathlib.Path("a b.txt"), pathlib.Path("c.txt")]
    assert (options.init, options.lora_plus, options.shuffle) == ("olora", 16.0, False)


SIGNALLED = """
import sys
from lora_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "completion", "chat"])
def test_rows_of_every_kind(kind, tmp_path, run):
    data = jsonl(tmp_path / "d.jsonl", kind)
    done = run(*words(data, tmp_path / "out", "--steps", 2, "--dora", "--accumulate", 2))
    assert done.status == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_base(init, play, tmp_path, run):
    """The written adapter fits the original base."""
    out = tmp_path / "out"
    command = words(play, out, "--eval-split", 0.25, "--eval-rows", 4, "--steps", 3, "--init", init)
    assert run(*command).status == 0
    test_the_adapter_is_what_was_measured((out, command))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(play, tmp_path):
    """Resuming with the printed command ends as a run that was never interrupted."""
    out = tmp_path / "out"
    command = words(play, out, "--steps", 400, "--eval-split", 0.25, "--dropout", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, *command], stderr=subprocess.PIPE, text=True
    ) as process:
        while not (out / "log.jsonl").exists() or len(log.read(out / "log.jsonl")) < 4:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        *_, said = process.communicate()[1].splitlines()
    assert process.returncode == 130
    step = log.read(out / "log.jsonl")[-1]["step"]
    assert 3 <= step < 400
    head, _, again = said.partition("to resume: lora-jax ")
    saved = f"step {step} of 400 is saved, with its adapter in {out / 'adapter'}; "
    assert head == f"error: interrupted: {saved}"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert again.endswith("--resume")
    whole = [str(tmp_path / "whole") if word == str(out) else word for word in command]
    assert main(again.split()) == 0 and main(whole) == 0
    one, other = (log.read(path / "log.jsonl") for path in (out, tmp_path / "whole"))
    assert [log.without_speed(r) for r in one] == [log.without_speed(r) for r in other]
