"""The device does not wait: steps are dispatched before what earlier ones measured is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import loop
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Watcher, train
from lora_jax.training.running import ahead
from tests.training import tiny_model


class Unread:
    """A device scalar that notes when the host asks for it."""

    def __init__(self, events, step, value):
        self.events, self.step, self.value = events, step, value

    def __array__(self, dtype=None, copy=None):
        if ("read", self.step) not in self.events:
            self.events.append(("read", self.step))
        return np.asarray(self.value, dtype)


@pytest.fixture
def events(monkeypatch):
    """Return what happens in a run, in order; no step computes anything."""
    found = []

    def make_step(*_):
        def step(state, base, batch, done):
            number = int(done) + 1
            found.append(("dispatch", number))
            values = {"loss": float(number), "weight": 3.0, "gradient_norm": 1.0}
            measured = {name: Unread(found, number, x) for name, x in values.items()}
            return dataclasses.replace(state, step=state.step + 1), measured

        return step

    monkeypatch.setattr(loop, "make_step", make_step)
    return found


@pytest.mark.parametrize("late", [1, 2])
def test_a_step_is_dispatched_before_the_one_before_is_read(events, late, monkeypatch, tmp_path):
    monkeypatch.setattr(ahead, "late_steps", lambda: late)
    job, start = tiny_model.job(tmp_path, steps=9, save_every=5)
    place = lambda batch: events.append(("place", None)) or jax.device_put(batch)
    outcome = train(dataclasses.replace(job, place=place), start)
    at = {event: i for i, event in enumerate(events) if event[0] != "place"}
    for step in range(1, 9):
        last = min(step + late, 5 if step <= 5 else 9)  # a checkpoint waits, and the end does
        assert at["dispatch", last] < at["read", step] < at.get(("dispatch", last + 1), len(events))
    assert [(r["step"], r["loss"]) for r in outcome.records] == [(i, i) for i in range(1, 10)]
    # the batch of a step is placed before the step before is dispatched, and none is left over
    places = [i for i, event in enumerate(events) if event[0] == "place"]
    assert len(places) == 9
    assert all(places[step] < at["dispatch", step] for step in range(1, 9))


def test_a_stop_ends_the_run_after_the_steps_that_are_dispatched(events, tmp_path):
    """The checkpoint is that of the last of them, and all are in the log."""
    seen = []
    watcher = Watcher(stop=lambda: 2 in seen, step=lambda record: seen.append(record["step"]))
    job, start = tiny_model.job(tmp_path, steps=9)
    outcome = train(job, start, watcher)
    assert outcome.step == 3 and seen == [1, 2, 3]
    assert [event for event in events if event[0] == "dispatch"][-1] == ("dispatch", 3)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3]


@pytest.mark.parametrize("late", [1, 2])
def test_steps_after_one_that_failed_change_nothing(late, monkeypatch, tmp_path):
    """The state that is saved is the one before it, to the bit, however late it is read."""
    job, start = tiny_model.job(tmp_path / "bad", steps=6, shuffle=False, rows=2)
    loss = lambda params, batch: {
        **(sums := job.loss(params, batch)),
        "loss": jnp.where((batch["ids"] == 999).any(), jnp.nan, sums["loss"]),
    }
    ids = job.data.arrays["ids"].copy()
    ids[5, 3] = 999  # in the third step
    bad = dataclasses.replace(
        job, loss=loss, data=dataclasses.replace(job.data, arrays={**job.data.arrays, "ids": ids})
    )
    monkeypatch.setattr(ahead, "late_steps", lambda: late)
    saved = []
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        train(bad, start, Watcher(saved=lambda x, step: saved.append((step, jax.device_get(x)))))
    ((step, found),) = saved
    assert step == 2
    good, _ = tiny_model.job(None, steps=6, shuffle=False, rows=2)
    seen = []
    monkeypatch.setattr(ahead, "late_steps", lambda: 0)
    stop = Watcher(stop=lambda: 2 in seen, step=lambda record: seen.append(record["step"]))
    expected = train(good, start, stop)
    assert expected.step == 2
    for a, b in zip(*map(jax.tree.leaves, (found, expected.adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_seconds_of_entries_add_up(monkeypatch):
    """By hand: an entry's time begins where the one before was read, or later where it did."""
    clock = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr(ahead.time, "perf_counter", lambda: next(clock))
    read = []
    late = ahead.Late(lambda name, value, seconds: read.append((name, value, seconds)), late=1)
    late.put("a", 1, began=4.0)
    late.put("b", 2, began=5.0)  # reads a at 10
    late.read_all()  # reads b at 14
    late.put("c", 3, began=14.5)
    late.read_all()  # reads c at 15, which had nothing to wait for
    assert read == [("a", 1, 6.0), ("b", 2, 4.0), ("c", 3, 0.5)]
