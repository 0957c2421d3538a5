"""The loop of a sweep: one compiled step for all runs, until each of them is done or stopped."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.training import log
from lora_jax.training.batching import Batch, Data, Source
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import (
    Settings,
    describe_sums,
    is_due,
    record_of,
    sum_over,
    what_is_not_finite,
)
from lora_jax.training.run_files import RunFiles
from lora_jax.training.running.ahead import Late
from lora_jax.training.running.feed import Feed
from lora_jax.training.running.speed import speed
from lora_jax.training.step import Loss, make_evaluation
from lora_jax.training.sweeping.comparison import of_run, result
from lora_jax.training.sweeping.course import Course


@dataclass(frozen=True)
class SweepJob:
    """What to train on what, for many runs.

    Attributes:
      sweep: the runs, their base and their optimizer; its step measures what `make_gradients` does.
      names: of the runs, in their order.
      loss: sums over a batch, for the plain model; for evaluations.
      base: the model's parameters.
      data: rows to train on.
      settings: how long each run is, and how often the sweep is saved. The seed of a run is its
        own, and its order of the rows too.
      schedule: the learning rate of each step over that of the run, only for the log.
      held_out: rows to evaluate a run on when it is judged, if any.
      directory: for the checkpoints and `log.jsonl`; with None nothing is written.
      eta: of so many runs one is kept when they are judged, as in `Course`; None: all are kept.
      shares_batches: whether all slots get the same batch, see `batches_are_shared`; the sweep must
        have been made for that.
    """

    sweep: lora.Sweep
    names: Sequence[str]
    loss: Loss
    base: Any
    data: Source
    settings: Settings
    schedule: Callable[[int], Any]
    held_out: Data | None = None
    directory: Path | None = None
    eta: int | None = None
    shares_batches: bool = False

    @property
    def rows(self) -> int:
        """The rows of a batch of one run."""
        return self.settings.rows * self.settings.accumulate

    def course(self) -> Course:
        """Return the course of the runs before the first step."""
        return Course.new(len(self.names), self.sweep.slots, self.settings.steps, self.eta)

    def example(self) -> Batch:
        """Return a batch of all slots, for its shapes and dtypes."""
        one = self.data.example(self.rows)
        if self.shares_batches:
            return one
        return {name: np.stack([x] * self.sweep.slots) for name, x in one.items()}


def batches_are_shared(
    runs: Sequence[lora.Run], slots: int, eta: int | None, shuffle: bool
) -> bool:
    """Return whether all slots see the same batch in each step, which then has no axis of slots.

    So they do if their orders of the rows are the same, and they start together.
    """
    starts_together = eta is None or slots == len(runs)
    return starts_together and (not shuffle or len({run.seed for run in runs}) == 1)


@dataclass(frozen=True)
class SweepWatcher:
    """Callbacks of a sweep, all optional."""

    stop: Callable[[], bool] = lambda: False  # checked between steps
    step: Callable[[Sequence[log.Record]], None] = lambda records: None  # of one step of all runs
    start: Callable[[int, Course], None] = lambda done, course: None  # called once
    ended: Callable[[int, str, Any], None] = lambda run, how, adapters: None
    saved: Callable[[int, Mapping[int, Any]], None] = lambda step, adapters: None  # by run


def train_all(job: SweepJob, watcher: SweepWatcher = SweepWatcher()) -> list[dict[str, Any]]:
    """Train all runs, from the last checkpoint in the job's directory if there is one.

    As for `loop.train`, all depends on the runs alone: a resumed sweep has the same losses and
    adapters, to the bit, as one that was never interrupted.

    Returns:
      The log: for every step a record with "step" and how fast it was; for every step of a run one
      with "run", its name, "run_step", its own step, and the rest as in the log of a single run;
      likewise for every evaluation; for every run that ended "ended", one of those in
      `comparison`; and "course", which says what follows.

    Raises:
      TrainingError: checkpoints cannot be written or read.
    """
    run: list[_Running] = []
    saved = lambda _, step: watcher.saved(step, run[0].adapters()) if run else None
    with RunFiles(job.directory, saved) as files:
        done, state = files.resume(job.sweep.init())
        course = _restored(job.course(), files, done)
        watcher.start(done, course)
        run.append(_Running(job, watcher, files, done, state, course))
        run[0].steps()
        files.save(run[0].done, run[0].state)
    return files.records


def _restored(course: Course, files: RunFiles, done: int) -> Course:
    """Return the course of a sweep after so many steps, by its log.

    Raises:
      TrainingError: the log does not say where the runs are.
    """
    known = [record for record in files.records if "course" in record]
    began = known[-1]["step"] if known else 0
    try:
        course = course.restored(known[-1]["course"]) if known else course
        left = 0 if course.is_over else course.stretch
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        left = -1
    if done - began > left:
        raise TrainingError(
            "log.jsonl: lacks what became of the runs, or it is damaged, so the sweep cannot be "
            "resumed. Start again with another --out"
        )
    course.advance(done - began)
    return course


class _Running:
    """The steps of a sweep that are dispatched, and the records of those that were read."""

    def __init__(
        self,
        job: SweepJob,
        watcher: SweepWatcher,
        files: RunFiles,
        done: int,
        state: lora.SweepState,
        course: Course,
    ) -> None:
        self.done, self.state, self.course = done, state, course
        self._first = done + 1
        self._job, self._watcher, self._files = job, watcher, files
        self._late: Late[tuple[int, dict[int, tuple[int, int]]]] = Late(self._read)
        self._evaluate = make_evaluation(job.loss, stacked=True)

    def steps(self) -> None:
        """Take the steps that are left, until the watcher stops them."""
        stop = self._watcher.stop
        while not self.course.is_over and not stop():
            if self.course.due:
                self._judge()
                continue
            feed = self._feed()
            for _ in range(self.course.stretch):
                if stop():
                    break
                self._step(feed)
        self._late.read_all()

    def adapters(self) -> dict[int, Any]:
        """Return the overlays of the runs in the slots, if they made a step and did not diverge."""
        overlays, lost = self._job.sweep.adapters(self.state), self._lost()
        places = self._occupied().items()
        return {run: overlays[slot] for slot, (run, step) in places if step and run not in lost}

    def _lost(self) -> set[int]:
        """Return the runs that diverged."""
        names = {record["run"] for record in self._files.records if "diverged" in record}
        return {self._job.names.index(name) for name in names}

    def _occupied(self) -> dict[int, tuple[int, int]]:
        """Return the run in each slot, and its steps."""
        course = self.course
        return {
            slot: (run, step)
            for slot, (run, step) in enumerate(zip(course.slots, course.done, strict=True))
            if run is not None
        }

    def _step(self, feed: Feed) -> None:
        began = time.perf_counter()
        batch = feed.next()
        self.state, measured = self._job.sweep.step(self.state, batch)
        self.done += 1
        self.course.advance()
        self._late.put((self.done, self._occupied()), measured, began)
        if is_due(self.done, self._job.settings.save_every, -1) and self.course.stretch:
            self._save()

    def _save(self) -> None:
        self._late.read_all()
        self._files.save(self.done, self.state)

    def _read(
        self, name: tuple[int, Mapping[int, tuple[int, int]]], measured: Any, seconds: float
    ) -> None:
        """Write the records of a step."""
        step, occupied = name
        job, tokens, records = self._job, 0, []
        factors = {own: float(job.schedule(own - 1)) for _, own in occupied.values()}
        for slot, (run, own) in occupied.items():
            values = {key: float(x[slot]) for key, x in measured.items()}
            tokens += round(values.get("tokens", values["weight"]))
            names = self._names(step, run, own)
            if what_is_not_finite(values):
                records.append({**names, "diverged": True})
                continue
            rate = factors[own] * job.sweep.runs[run].learning_rate
            records.append({**record_of(own, values, rate), **names})
        whole = {"step": step, "tokens": tokens, "seconds": round(seconds, 4)}
        if step > self._first:  # which compiled
            whole |= speed(whole, None)
        self._note([whole, *records])

    def _names(self, step: int, run: int, own: int) -> dict[str, Any]:
        return {"step": step, "run": self._job.names[run], "run_step": own}

    def _note(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            self._files.note(record)
        self._watcher.step(records)

    def _judge(self) -> None:
        """Judge the runs that are due, and put others in the slots of those that end."""
        self._late.read_all()
        before, due = self._occupied(), self.course.due
        if self._job.held_out is not None:
            self._note(self._evaluations(due))
        ended, started = self.course.judge({slot: self._score(before[slot]) for slot in due})
        for slot, how in ended.items():
            run, own = before[slot]
            self._watcher.ended(run, how, self._job.sweep.adapters(self.state)[slot])
            self._note([{**self._names(self.done, run, own), "ended": how}])
        for slot in started:
            new = self._job.sweep.runs[self._occupied()[slot][0]]
            self.state = self._job.sweep.replace(self.state, slot, new)
        self._note([{"step": self.done, "course": self.course.to_json()}])
        if is_due(self.done, self._job.settings.save_every, -1) and not self.course.is_over:
            self._save()

    def _evaluations(self, slots: Sequence[int]) -> list[dict[str, Any]]:
        """Return the records of the evaluations of the runs in these slots."""
        job, held_out = self._job, self._job.held_out
        assert held_out is not None
        began = time.perf_counter()
        sums = sum_over(self._evaluate, self.state.adapters, job.base, held_out, job.settings.rows)
        seconds = {"eval_seconds": round(time.perf_counter() - began, 4)}
        occupied, records = self._occupied(), []
        for slot in slots:
            found = describe_sums({name: x[slot] for name, x in sums.items()})
            known = (
                {**found, **seconds} if math.isfinite(found["eval_loss"]) else {"diverged": True}
            )
            records.append({**self._names(self.done, *occupied[slot]), **known})
        return records

    def _score(self, place: tuple[int, int]) -> float:
        name = self._job.names[place[0]]
        return result(name, of_run(self._files.records, name)).score

    def _feed(self) -> Feed:
        """Return the batches of the steps until the next run is to be judged."""
        job = self._job
        by_slot = [self._batches(slot) for slot in range(job.sweep.slots)]
        first = next(iter(self._occupied()))
        found = by_slot[first] if job.shares_batches else _stacked(by_slot)
        left = itertools.islice(found, self.course.stretch)
        return Feed(left, jax.device_put, job.example)

    def _batches(self, slot: int) -> Iterator[Batch]:
        """Yield the batches of the run in a slot; empty rows where there is none."""
        job, run = self._job, self.course.slots[slot]
        if run is None:
            return itertools.repeat(job.data.example(job.rows))
        seed = job.sweep.runs[run].seed if job.settings.shuffle else None
        return job.data.batches_from(job.rows, seed, self.course.done[slot])


def _stacked(by_slot: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """Yield a batch of each slot as one, `[slots, rows, ...]`."""
    for parts in zip(*by_slot, strict=True):
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}
