"""The loop: what it writes, that resuming is exact, and what stops it."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.training import batching, log, loop, loss_curve
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.errors import TrainingError
from lora_jax.training.interrupt import interruptible
from lora_jax.training.loop import Watcher, train
from tests.training import tiny_model
from tests.training.test_loss import by_hand

HELD_OUT = batching.cut_stream(tiny_model.stream(40, seed=9), 9)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def without_seconds(records):
    return [log.without_speed(record) for record in records]


def worse_at_last(made):
    """Return a job and its adapters; the seventh step is large, and away from the minimum."""
    job, start = made
    back = optax.scale_by_schedule(lambda done: jnp.where(done < 6, 1.0, -100.0))
    return dataclasses.replace(job, tx=optax.chain(job.tx, back)), start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run without interruption: the job, its outcome and the best adapters reported."""
    directory = tmp_path_factory.mktemp("whole")
    often = {"held_out": HELD_OUT, "eval_every": 3, "accumulate": 2}
    job, start = worse_at_last(tiny_model.job(directory, steps=7, **often))
    best = []
    outcome = train(job, start, Watcher(best=lambda a, r: best.append((jax.device_get(a), r))))
    return job, start, outcome, best


def test_the_log(whole):
    job, _, outcome, _ = whole
    records = log.read(job.directory / "log.jsonl")
    assert records == outcome.records and outcome.step == 7
    order = [(r["step"], "eval_loss" in r) for r in records]
    steps = [(step, False) for step in range(1, 8)]
    assert order == sorted([*steps, *((step, True) for step in (0, 3, 6, 7))])
    step, second, *_ = (r for r in records if "loss" in r)
    assert step.keys() == {"step", "loss", "tokens", "lr", "gradient_norm", "seconds"}
    speed = {"tokens_per_second", "flops", "flops_per_second", "peak_bytes"}
    assert second.keys() - step.keys() == speed  # the first step compiles
    seconds = max(second["seconds"], 1e-4)
    assert second["tokens_per_second"] == pytest.approx(second["tokens"] / seconds, abs=0.1)
    assert second["flops_per_second"] == pytest.approx(second["flops"] / seconds, abs=1)
    assert 50e6 < second["peak_bytes"] < 50e9  # of this process, which has imported JAX
    assert step["lr"] == pytest.approx(1e-2)  # the first of two steps of warm-up to 3e-2
    evaluation = log.evaluations(records)[-1]
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
    losses = log.losses(records)[1]
    assert losses[-1] < losses[0]
    # 119 tokens to predict in 15 rows, 6 per step: an epoch of 3 steps
    assert sum(r["tokens"] for r in records if "loss" in r and r["step"] <= 3) == 119


def test_the_evaluation_by_hand(whole):
    job, _, outcome, _ = whole
    merged = lora.merge(lora.join(job.base, outcome.adapters))
    x = HELD_OUT.arrays
    logits = jax.jit(tiny_model.apply)(merged, x["ids"], x["segments"])
    expected = by_hand(logits, x["ids"], x["segments"], x["weights"]) / x["weights"].sum()
    assert log.evaluations(outcome.records)[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_best_is_reported(whole):
    _, _, outcome, best = whole
    evaluated = [r["eval_loss"] for r in log.evaluations(outcome.records)]
    lowest = [r for i, r in enumerate(evaluated) if r < min(evaluated[:i], default=math.inf)]
    assert [r["eval_loss"] for _, r in best] == lowest and 1 < len(lowest) < len(evaluated)


def test_the_initial_adapters_and_the_base_are_unchanged(whole):
    job, start, outcome, _ = whole
    base, adapters = tiny_model.adapters()
    for a, b in zip(leaves((job.base, start)), leaves((base, adapters)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(*map(leaves, (start, outcome.adapters)), strict=True))


def stopping_at(step):
    """Return a watcher that asks to stop after a step."""
    seen = []
    return Watcher(stop=lambda: step in seen, step=lambda record: seen.append(record["step"]))


def test_resuming_is_exact(whole, tmp_path):
    """Losses, evaluations and adapters are the same to the bit, after a stop and after a kill."""
    _, start, outcome, _ = whole
    often = {"eval_every": 3, "save_every": 2, "accumulate": 2}
    job, _ = worse_at_last(tiny_model.job(tmp_path, steps=7, held_out=HELD_OUT, **often))
    assert train(job, start, stopping_at(3)).step == 3  # an evaluation is due, and skipped
    assert train(job, start, stopping_at(6)).step == 6
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # as if killed before: the log is ahead
    resumed = train(job, start)
    assert without_seconds(resumed.records) == without_seconds(outcome.records)
    assert log.read(tmp_path / "log.jsonl") == resumed.records
    for a, b in zip(*map(leaves, (resumed.adapters, outcome.adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_stays_as_it_is(whole):
    job, start, outcome, _ = whole
    again = train(job, start)
    assert again.records == outcome.records
    for a, b in zip(*map(leaves, (again.adapters, outcome.adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_without_a_directory(whole):
    """The same losses; nothing is written, and there is nothing to resume."""
    job, start, outcome, _ = whole
    in_memory = dataclasses.replace(job, directory=None, rates=None)
    for _ in range(2):
        found = train(in_memory, start)
        without_rates = [{k: v for k, v in r.items() if k != "lr"} for r in outcome.records]
        assert without_seconds(found.records) == without_seconds(without_rates)
    for a, b in zip(*map(leaves, (found.adapters, outcome.adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_in_their_order(tmp_path):
    """Only the last of the 14 rows is not full, and it is in every epoch's last step."""
    job, start = tiny_model.job(tmp_path, steps=4, rows=8, shuffle=False)
    assert [r["tokens"] for r in train(job, start).records] == [72, 47, 72, 47]


def test_a_loss_that_is_not_finite(tmp_path):
    """The state before it is saved, and a run without the bad row continues from there."""
    job, start = tiny_model.job(tmp_path, steps=4)

    def broken(params, batch):
        sums = job.loss(params, batch)
        bad = (batch["ids"] == 999).any()
        return {**sums, "loss": jnp.where(bad, jnp.nan, sums["loss"])}

    poisoned = job.data.arrays["ids"].copy()
    poisoned[np.random.default_rng([5, 0]).permutation(len(poisoned))[6]] = 999  # of the third step
    bad = dataclasses.replace(
        job, loss=broken, data=batching.Data({**job.data.arrays, "ids": poisoned})
    )
    with pytest.raises(
        TrainingError, match="step 3: the loss is nan; lower the learning rate \\(--lr\\)"
    ) as error:
        train(bad, start)
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert [r["step"] for r in log.read(tmp_path / "log.jsonl")] == [1, 2]
    resumed = train(job, start)
    assert [r["step"] for r in resumed.records] == [1, 2, 3, 4]
    assert np.isfinite(log.losses(resumed.records)[1]).all()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": state["x"] + step})
        assert checkpoints.steps() == [2, 3]
        step, found = checkpoints.restore(state)
        assert step == 3 and found["x"].tolist() == [3, 4, 5]
    for file in (tmp_path / "3").rglob("*"):
        if file.is_file() and file.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"):
            file.write_bytes(file.read_bytes()[:3])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TrainingError, match="cannot read any checkpoint"):
            checkpoints.restore({"y": state["x"]})
        assert checkpoints.steps() == [2, 3]  # of another state: nothing was moved
        with pytest.warns(
            UserWarning, match="checkpoint 3 cannot be read .* moved to unreadable/3"
        ):
            assert checkpoints.restore(state)[0] == 2
        checkpoints.save(3, {"x": state["x"] + 3})  # the damaged one does not stand in its place
    with Checkpoints(tmp_path) as checkpoints:
        step, found = checkpoints.restore(state)
        assert step == 3 and found["x"].tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["9" * 15, "9" * 30, "-1", "007", "+5", "\u0663", "4"])
def test_a_step_of_an_absurd_number_is_not_the_newest(tmp_path, name):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"x": state["x"] + 2})
        checkpoints.save(3, {"x": state["x"] + 3})
    (tmp_path / "3").rename(tmp_path / name)
    with (
        pytest.warns(UserWarning, match=r"cannot be read .* moved to unreadable/"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        step, found = checkpoints.restore(state)
        assert step == 2 and found["x"].tolist() == [2, 3, 4]
        checkpoints.save(4, state)
        assert checkpoints.steps() == [2, 4]


def test_where_no_step_is_left_nothing_starts_again_unsaid(tmp_path):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text('{"metrics": ' + "[" * 100_000)
    with pytest.warns(UserWarning, match="nested too deeply"):
        Checkpoints(tmp_path).close()
    for _ in range(2):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(TrainingError, match=r"cannot read any checkpoint \(unreadable/2\)"),
        ):
            checkpoints.restore(state)


@pytest.mark.parametrize(
    "change",
    [
        {"performance_metrics": {"a": 0.5}},
        {"performance_metrics": "x"},
        {"metrics": [1]},
        {"commit_timestamp_nsecs": "now"},
        {"unknown": 1},
        {"item_handlers": 3},
    ],
)
def test_metadata_that_orbax_cannot_open_is_moved_aside(tmp_path, change):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
        checkpoints.save(3, state)
    file = tmp_path / "3" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with (
        pytest.warns(UserWarning, match="checkpoint 3 cannot be read .* moved to unreadable/3"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        assert checkpoints.restore(state)[0] == 2


def test_checkpoints_of_earlier_releases_have_no_step_in_their_metadata(tmp_path):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
    file = tmp_path / "2" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state)[0] == 2


def test_killed_while_an_old_step_is_deleted(tmp_path, monkeypatch, caplog):
    """What remains is not a step, causes no message, and is removed by the next process."""

    def killed(path, **_):
        if path.is_dir():
            raise KeyboardInterrupt

    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(3, state)
    (left,) = tmp_path.glob("*/1")
    (left / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3] and checkpoints.restore(state)[0] == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert caplog.messages == []


def test_a_torn_line_of_the_log(tmp_path):
    file = tmp_path / "log.jsonl"
    for step in (1, 2, 3, 4):
        log.append(file, {"step": step, "loss": 1.0})
    file.write_text(file.read_text()[:-9])
    assert [r["step"] for r in log.rewind(file, 2)] == [1, 2]
    log.append(file, {"step": 3, "loss": 0.5})
    assert log.losses(log.read(file)) == ([1, 2, 3], [1.0, 1.0, 0.5])


def test_the_picture(whole, tmp_path):
    _, _, outcome, _ = whole
    loss_curve.draw(outcome.records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss_curve.draw([], tmp_path / "empty.png")


@pytest.fixture
def default_handler():
    """Install Python's own handler, which a process in a shell's background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_first_signal_asks_and_a_second_one_interrupts(default_handler):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt() and interrupt.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


SCRIPT = """
import sys, pathlib
from tests.training import tiny_model
from lora_jax.training.interrupt import interruptible
from lora_jax.training.loop import Watcher, train
job, start = tiny_model.job(pathlib.Path(sys.argv[1]), steps=100_000)
with interruptible() as stop:
    def told(record):
        if record["step"] == 3:
            print("running", flush=True)
    outcome = train(job, start, Watcher(stop=stop, step=told))
print("stopped", outcome.step, stop.signal)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(tmp_path, number):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "running\n"
        run.send_signal(number)
        said = run.stdout.read().split()
    assert run.returncode == 0 and said[0] == "stopped" and int(said[2]) == number
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [int(said[1])]
    assert log.read(tmp_path / "log.jsonl")[-1]["step"] == int(said[1])


def test_settings_that_are_refused():
    for field in ("steps", "rows", "accumulate"):
        with pytest.raises(TrainingError, match=f"{field} must be positive"):
            loop.Settings(**{"steps": 1, field: 0})
    for field in ("seed", "eval_every", "save_every"):
        with pytest.raises(TrainingError, match=f"{field} must not be negative"):
            loop.Settings(**{"steps": 1, field: -1})


def test_the_log_is_json_lines(whole):
    job, *_ = whole
    lines = (job.directory / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
