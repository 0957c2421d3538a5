"""The loop: steps, evaluations, checkpoints and a log. Resuming is exact to the bit."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from lora_jax.files.disk.processes import is_first, span_processes, together
from lora_jax.training import log
from lora_jax.training.batching import Batch, Data, Source, batches
from lora_jax.training.distributed.agreement import agreeing
from lora_jax.training.errors import TrainingError
from lora_jax.training.run_files import RunFiles
from lora_jax.training.running.ahead import Late, place_ahead
from lora_jax.training.running.feed import Feed
from lora_jax.training.running.flops import flops_of_step
from lora_jax.training.running.profile import Profile, steps_to_profile
from lora_jax.training.running.speed import speed
from lora_jax.training.step import Loss, State, init_state, make_evaluation, make_step


@dataclass(frozen=True)
class Settings:
    """How long to train, and how often to evaluate and save.

    Raises:
      TrainingError: a field has an invalid value; the message names it.
    """

    steps: int
    rows: int = 4  # rows per micro-batch
    accumulate: int = 1  # micro-batches per step
    seed: int = 0  # random seed for data order and dropout
    shuffle: bool = True  # a new order every epoch; otherwise the rows as they stand
    eval_every: int = 0  # steps; 0 evaluates only before the first step and after the last
    save_every: int = 0  # steps; 0 saves only after the last
    profile: int = 0  # steps to trace into the job's directory, once the first ones are done
    patience: int = 0  # evaluations in a row without a lower loss that end the run; 0: none do
    merge_aware: bool = False  # as in `lora_jax.lora`, for a quantized base

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("seed", "eval_every", "save_every", "profile", "patience"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    """What to train on what.

    Attributes:
      loss: sums over a batch, for the plain model (`lora_jax.lora` is applied by the step).
      base: the model's parameters, as `lora_jax.split` returns them.
      tx: the optimizer of the adapters, any optax transformation.
      data: rows to train on.
      settings: how long and how often.
      held_out: rows to evaluate on, if any.
      rates: the learning rate of each step, only for the log.
      directory: for the checkpoints and `log.jsonl`; with None nothing is written.
      place: puts a batch on the device, or on the devices of a mesh: `jax.device_put`, if need be
        with a sharding. The loop calls it before the step that the batch is for.
      own_rows: the rows of each batch that this process's devices get, as `rows_of` returns them; a
        stream reads no others. None for all.
    """

    loss: Loss
    base: Any
    tx: optax.GradientTransformation
    data: Source
    settings: Settings
    held_out: Data | None = None
    rates: Callable[[int], Any] | None = None
    directory: Path | None = None
    place: Callable[[Batch], Any] = jax.device_put
    own_rows: Collection[int] | None = None


@dataclass(frozen=True)
class Watcher:
    """Callbacks of a run, all optional."""

    stop: Callable[[], bool] = lambda: False  # checked between steps
    step: Callable[[log.Record], None] = lambda record: None  # called with every log record
    best: Callable[[Any, log.Record], None] = lambda adapters, record: None  # lowest loss so far
    start: Callable[[int], None] = lambda done: None  # called once, with the steps done before
    saved: Callable[[Any, int], None] = lambda adapters, step: None  # called after a checkpoint
    profiled: Callable[[str], None] = lambda line: None  # called with where the trace is


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    adapters: Any
    step: int  # steps done; fewer than requested if the run was stopped or ended early
    records: list[dict[str, Any]]  # the whole log
    ended_early: bool = False  # by `Settings.patience`


def train(job: Job, adapters: Any, watcher: Watcher = Watcher()) -> Outcome:
    """Train `adapters`, from the last checkpoint in the job's directory if there is one.

    Data order and dropout depend on seed and step alone, so a resumed run takes the same steps,
    to the bit, as one that was never interrupted.

    The device does not wait for the host: batches are placed before their step, and what a step
    measured is read once one or two more are dispatched. Those are in the run, too, when the
    watcher asks to stop. A checkpoint or an evaluation comes after the records of all its steps.

    In a run of several processes, all call this with the same job, whose arrays span them. They
    stop together when a watcher of one of them asks for it, and process 0 writes the log.

    Args:
      job: the loss, the data, the settings.
      adapters: the initial adapters, as `lora_jax.split` returns them; they are left unchanged.
      watcher: callbacks, one of which may stop the run.

    Raises:
      DataError: rows of a stream cannot be read; the state before their step is saved.
      TrainingError: the loss or the gradient is not finite (the state before that step is saved,
        and resuming continues from it), checkpoints cannot be written or read, or more steps are
        done than requested.
    """
    with (
        agreeing(watcher.stop, several=span_processes(adapters, job.base)) as (stop, fail),
        RunFiles(job.directory, watcher.saved, fail) as files,
    ):
        watcher = dataclasses.replace(watcher, stop=stop)
        done, state = files.resume(init_state(adapters, job.tx))
        _check_done(job, done)
        watcher.start(done)
        run = _Run(job, watcher, files, done, state)
        run.steps()
        files.save(run.done, run.state)
    is_early = run.done < job.settings.steps and run.is_out_of_patience()
    return Outcome(run.state.adapters, run.done, files.records, is_early)


def _check_done(job: Job, done: int) -> None:
    if done > job.settings.steps:
        raise TrainingError(
            f"{job.directory}: the run has done {done} steps already, more than --steps "
            f"{job.settings.steps}; request more steps, or choose another --out"
        )


class _Run:
    """The steps of a run that are dispatched, and the records of those that were read."""

    def __init__(
        self, job: Job, watcher: Watcher, files: RunFiles, done: int, state: State
    ) -> None:
        self.done, self.state = done, state  # the last step dispatched, and the state after it
        self._first = done + 1
        self._flops: int | None = None  # of a step, once that was traced
        self._waited = log.evaluations_since_best(files.records)
        self._job, self._watcher, self._files = job, watcher, files
        self._evaluate = _make_evaluate(job, watcher, files.records, self._note)
        self._feed = _feed(job, done)
        self._late: Late[int] = Late(self._read)

    def steps(self) -> None:
        """Take the steps that are left, until the watcher stops them."""
        job, settings, stop = self._job, self._job.settings, self._watcher.stop
        options = (settings.accumulate, settings.seed, self.state, settings.merge_aware)
        step = make_step(job.loss, job.tx, *options)
        ahead = int(self.state.step) - self.done
        self._evaluate(self.done, self.state)
        with self._profile() as profile:
            while self.done < settings.steps and not stop() and not self.is_out_of_patience():
                profile.before(self.done + 1)
                began = time.perf_counter()
                inputs = (self.state, job.base, self._feed.next(), np.int32(self.done + ahead))
                self._flops = self._flops or flops_of_step(step, *inputs)
                with jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1):
                    self.state, measured = step(*inputs)
                rate = job.rates(self.done) if job.rates else None
                self.done += 1
                self._late.put(self.done, (measured, rate), began)
                profile.after(self.done)
                self._pause()
        self._late.read_all()

    def is_out_of_patience(self) -> bool:
        """Return whether the last evaluations are without progress, and the run is to end."""
        patience = self._job.settings.patience
        return bool(patience) and self._waited >= patience

    def _pause(self) -> None:
        """Evaluate and save after a step, if that is due."""
        settings, stop = self._job.settings, self._watcher.stop
        is_saved = is_due(self.done, settings.save_every, settings.steps)
        if is_saved or is_due(self.done, settings.eval_every, settings.steps):
            self._late.read_all()
            if not stop():
                self._evaluate(self.done, self.state)
        if is_saved:
            self._files.save(self.done, self.state)

    def _profile(self) -> Profile:
        job, count = self._job, self._job.settings.profile
        steps = range(self._first, job.settings.steps + 1)
        is_here = job.directory is not None and is_first()
        chosen = steps_to_profile(steps, count) if is_here else range(0)
        directory = (job.directory or Path()) / "profile"
        return Profile(chosen, directory, self._late.read_all, self._watcher.profiled)

    def _read(self, step: int, found: tuple[Any, Any], seconds: float) -> None:
        """Write the record of a step, unless it failed."""
        measured, rate = found
        values = {name: float(x) for name, x in measured.items()}
        unfit = what_is_not_finite(values)
        if unfit:
            self._files.save(step - 1, self.state)  # this step and later ones left it as it was
            together(self._feed.check)
            raise TrainingError(_explain_not_finite(unfit, values[unfit], step, self._files))
        record = {**record_of(step, values, rate), "seconds": round(seconds, 4)}
        if step > self._first:  # which compiled
            record |= speed(record, self._flops)
        self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        self._files.note(record)
        if "eval_loss" in record:
            self._waited = log.evaluations_since_best(self._files.records)
        self._watcher.step(record)


def _feed(job: Job, done: int) -> Feed:
    """Return the batches of the steps that are left."""
    settings = job.settings
    size, order = settings.rows * settings.accumulate, settings.seed if settings.shuffle else None
    found = job.data.batches_from(size, order, done, job.own_rows)
    left = itertools.islice(found, settings.steps - done)
    return Feed(left, job.place, lambda: job.data.example(size))


def record_of(step: int, values: Mapping[str, float], rate: Any) -> dict[str, Any]:
    """Return a step's record for the log, without its time."""
    return {
        "step": step,
        "loss": values["loss"],
        "tokens": round(values.get("tokens", values["weight"])),
        **({} if rate is None else {"lr": float(rate)}),
        "gradient_norm": values["gradient_norm"],
        **({"accuracy": values["right"] / values["weight"]} if "right" in values else {}),
        **_means(values),
    }


_NAMED = {"loss", "weight", "right", "tokens", "gradient_norm"}  # sums with other names in a record


def _means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the other sums of a loss, divided by the weight."""
    return {name: float(x / sums["weight"]) for name, x in sums.items() if name not in _NAMED}


def what_is_not_finite(values: Mapping[str, float]) -> str | None:
    """Return the name of what is not finite in a step's values, the loss first; None if all is."""
    return next((n for n in ("loss", "gradient_norm") if not math.isfinite(values[n])), None)


def _explain_not_finite(name: str, value: float, step: int, files: RunFiles) -> str:
    advice = (
        f"step {step}: the {name.replace('_', ' ')} is {value}; lower the "
        "learning rate (--lr), lengthen the warm-up (--warmup) or use float32 (--dtype float32)"
    )
    if files.checkpoints is None:
        return advice
    return f"{advice}. The state before this step is saved in {files.checkpoints.directory}"


def _make_evaluate(
    job: Job,
    watcher: Watcher,
    records: list[dict[str, Any]],
    note: Callable[[dict[str, Any]], None],
) -> Callable[[int, State], None]:
    """Return a function that evaluates after a step if that is due and not in the log yet."""
    run = make_evaluation(job.loss, job.settings.merge_aware)
    held_out = job.held_out

    def evaluate(done: int, state: State) -> None:
        due = done == 0 or is_due(done, job.settings.eval_every, job.settings.steps)
        known = log.evaluations(records)
        if held_out is None or not due or any(r["step"] == done for r in known):
            return
        began = time.perf_counter()
        found = measure(run, state.adapters, job.base, held_out, job.settings.rows, job.place)
        record = {"step": done, **found, "eval_seconds": round(time.perf_counter() - began, 4)}
        if all(found["eval_loss"] < r["eval_loss"] for r in known):
            watcher.best(state.adapters, record)
        note(record)

    return evaluate


def measure(
    run: Callable[..., Any],
    adapters: Any,
    base: Any,
    data: Data,
    rows: int,
    place: Callable[[Batch], Any] = jax.device_put,
) -> dict[str, float]:
    """Measure the loss over all of `data`, counting each token or text once.

    Args:
      run: from `make_evaluation`.
      rows: rows per batch.
      place: as in `Job`.

    Returns:
      As `describe_sums`.
    """
    return describe_sums(sum_over(run, adapters, base, data, rows, place))


def sum_over(
    run: Callable[..., Any],
    adapters: Any,
    base: Any,
    data: Data,
    rows: int,
    place: Callable[[Batch], Any] = jax.device_put,
) -> dict[str, Any]:
    """Return the sums of a loss over all of `data`, float64, as `measure` takes them."""
    total: dict[str, Any] = {}

    def add(_: None, sums: Mapping[str, Any], __: float) -> None:
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    late: Late[None] = Late(add)
    for batch in place_ahead(batches(data, rows), place):
        late.put(None, run(adapters, base, batch), 0.0)
    late.read_all()
    return total


def describe_sums(total: Mapping[str, Any]) -> dict[str, float]:
    """Return "eval_loss" of the sums of a loss, and what goes with it.

    That is "perplexity" (its exponential) for a language model; "eval_accuracy" for a classifier
    and for preferences, and the means of the other sums that the loss has.
    """
    loss = float(total["loss"] / total["weight"])
    if "right" in total:
        others = {f"eval_{name}": x for name, x in _means(total).items()}
        right = float(total["right"] / total["weight"])
        return {"eval_loss": loss, "eval_accuracy": right, **others}
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def is_due(done: int, every: int, steps: int) -> bool:
    """Return whether something is due after a step: every so many, if any, and after the last."""
    return done == steps or (every > 0 and done % every == 0)


def steps_of_epochs(epochs: float, data: Source, size: int) -> int:
    """Return how many steps of `size` rows go through `data` that many times.

    >>> import numpy as np
    >>> steps_of_epochs(2, Data({"ids": np.zeros((10, 3))}), size=4)
    6
    """
    return max(1, round(epochs * data.steps_per_epoch(size)))
