"""What `lora-jax sweep` does: a model, files and lists in; adapters, pictures and a table out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from rich.console import Console

import lora_jax as lora
from lora_jax.cli.jobs.sweeping.reports import SweepReports
from lora_jax.cli.jobs.sweeping.results import SweepResults
from lora_jax.cli.jobs.sweeping.watch import Watch
from lora_jax.cli.jobs.training import choose_remat
from lora_jax.cli.jobs.training.data import Task, read_task
from lora_jax.cli.jobs.training.model import TrainableModel, with_remat
from lora_jax.cli.jobs.training.reference import add_reference
from lora_jax.cli.jobs.training.results import Results
from lora_jax.cli.jobs.training.start import Start, config_of
from lora_jax.cli.jobs.training.stream import choose_streaming, describe_rows
from lora_jax.cli.jobs.training.train import (
    open_run,
    optimizer_of,
    settings_to_record,
    started,
    steps_of,
)
from lora_jax.cli.plurals import count
from lora_jax.cli.sweep_lists import Settings
from lora_jax.cli.sweep_options import LISTS, SweepOptions
from lora_jax.cli.words import in_options
from lora_jax.core.foreign import escaped
from lora_jax.training import run_record
from lora_jax.training.chunked_loss import CHUNK
from lora_jax.training.loop import Settings as LoopSettings
from lora_jax.training.optimizers.kinds import ADAMW, KINDS
from lora_jax.training.reporting.reporters import require
from lora_jax.training.running.step_memory import bytes_of
from lora_jax.training.step import Loss, make_gradients
from lora_jax.training.sweeping.comparison import results as results_of
from lora_jax.training.sweeping.loop import SweepJob, batches_are_shared, train_all
from lora_jax.training.sweeping.names import name_runs


def main(options: SweepOptions, grid: Sequence[Settings], command: str) -> None:
    """Train all runs of a grid, write their adapters, the log and pictures, and print a table.

    Args:
      options: of the command line.
      grid: the settings of every run.
      command: the command that would resume this sweep.

    Raises:
      KeyboardInterrupt: after Ctrl-C or SIGTERM, once all is saved; it says how to resume.
    """
    console = Console(stderr=True, highlight=False)
    say = lambda text: console.print(escaped(text), markup=False, soft_wrap=True)
    resumed = run_record.check_directory(options.out, options.resume)
    if options.resume and not resumed:
        say(f"nothing to resume in {options.out}: starting from the beginning")
    for name in options.report or ():
        require(name)
    now = started(options)
    announce = say if console.is_terminal else lambda text: None
    settings = dict(zip(name_runs(grid), grid, strict=True))
    options = choose_streaming(dataclasses.replace(options, **grid[0]), resumed)
    options, model, _ = open_run(options, now, announce)
    announce(f"reading {', '.join(map(str, [*options.data, *(options.held_out or ())]))}")
    task = read_task(options, model)
    for note in task.notes:
        say(f"note: {note}")
    steps = steps_of(options, task, resumed)
    with in_options(options):
        config = config_of(options, model, task)
        job = _job(options, settings, model, task, config, steps, say)
    this = run_record.identity(
        _to_record(options, settings, config, steps, job.sweep.slots),
        *(task.params, task.data, task.held_out, now),
        run_record.older_checksums(options.out) if resumed else (),
    )
    results = SweepResults(options, settings, _writers(options, settings, job, model, task, config))
    next(iter(results.writers.values())).check(job.sweep.adapters(job.sweep.init())[0])
    run_record.begin(options.out, this, resumed)
    say(_describe(options, job, task, steps))
    data = add_reference(options, model, task, Start(task.params, config), say)
    job = dataclasses.replace(job, **data)
    each = {name: {**this["settings"], **one} for name, one in settings.items()}
    reports = SweepReports(options.report or (), options.out, each, say)
    watch = Watch(results, steps, job.course().total, command, console, reports)
    with watch:  # to the end: a second signal may come while the pictures are drawn
        with watch.progress():
            records = train_all(job, watch.watcher)
        written = results.finish(records)
        if any(one.state is None for one in results_of(job.names, records)):
            raise KeyboardInterrupt(watch.describe_interruption())
        results.show(records, written)


def _job(
    options: SweepOptions,
    settings: Mapping[str, Settings],
    model: TrainableModel,
    task: Task,
    config: lora.LoraConfig,
    steps: int,
    say: Callable[[str], None],
) -> SweepJob:
    runs = [_run(options, one) for one in settings.values()]
    slots = min(options.slots or len(runs), len(runs))
    optimizer = optimizer_of(options)
    schedule = dataclasses.replace(optimizer, learning_rate=1.0).rates(steps)
    trained = {path for part in (config.targets, config.train) for path in part}  # type: ignore[union-attr]
    chunk = None if slots == 1 else max(1, CHUNK // slots)  # of each slot
    loop = LoopSettings(
        steps=steps,
        rows=options.batch,
        accumulate=options.accumulate,
        shuffle=options.shuffle,
        save_every=options.save_every,
    )
    example = task.data.example(options.size)

    eta = options.eta if options.halving else None
    is_shared = batches_are_shared(runs, slots, eta, options.shuffle)

    def job(remat: str) -> SweepJob:
        loss = task.loss(with_remat(model, remat), trained, chunk)
        sweep = lora.sweep(
            lora.lora(_mean(loss)),
            *(task.params, runs, config, example),
            slots=slots,
            optimizer=_optimizer(options),
            schedule=schedule,
            batch_axes=None if is_shared else 0,
            gradients=make_gradients(loss, options.accumulate),
        )
        return SweepJob(
            *(sweep, [*settings], loss, task.params, task.data, loop, schedule, task.held_out),
            directory=options.out,
            eta=eta,
            shares_batches=is_shared,
        )

    return job(choose_remat.choose(options, lambda remat: _needed(job(remat)), say))


def _optimizer(options: SweepOptions) -> Callable[..., Any]:
    """Return what makes the optimizer of a slot of its numbers, which are arrays."""
    kind = KINDS[options.optimizer]
    if options.optimizer == ADAMW:
        return optax.adamw

    def make(learning_rate: Any, params: Any, weight_decay: Any) -> optax.GradientTransformation:
        return kind.transformation(learning_rate, weight_decay, params)

    return make


def _needed(job: SweepJob) -> int:
    """Return the bytes that a step of all slots needs."""
    step = jax.jit(job.sweep.update, donate_argnums=1)
    return bytes_of(step, job.base, job.sweep.init(), job.example())


def _mean(loss: Loss) -> Callable[[Any, Any], Any]:
    def mean(params: Any, batch: Any) -> Any:
        sums = loss(params, batch)
        return sums["loss"] / sums["weight"]

    return mean


def _run(options: SweepOptions, settings: Settings) -> lora.Run:
    given = {name: x for name, x in settings.items() if name != "lr"}
    rate = settings["lr"]
    return lora.Run(learning_rate=rate, b_ratio=options.lora_plus, clip=options.clip, **given)


def _writers(
    options: SweepOptions,
    settings: Mapping[str, Settings],
    job: SweepJob,
    model: TrainableModel,
    task: Task,
    config: lora.LoraConfig,
) -> dict[str, Results]:
    """Return how the adapter of each run is written, by name."""
    tokenizer = model.tokenizer.files() if options.add_token else {}
    return {
        name: Results(
            options=dataclasses.replace(options, **one, out=options.out / name),
            task=task,
            naming=model.naming,
            config=run.config(config),
            start=task.params,
            tokenizer=tokenizer,
        )
        for (name, one), run in zip(settings.items(), job.sweep.runs, strict=True)
    }


def _to_record(
    options: SweepOptions,
    settings: Mapping[str, Settings],
    config: lora.LoraConfig,
    steps: int,
    slots: int,
) -> dict[str, Any]:
    """Return all that decides what the runs compute, under the names of the command line."""
    given = settings_to_record(options, Start(None, config), None, steps)
    lists = {
        several.replace("_", "-"): list(dict.fromkeys(one[name] for one in settings.values()))
        for name, several in LISTS.items()
    }
    shared = {name: x for name, x in given.items() if name not in {*LISTS, *LISTS.values()}}
    return {**shared, **lists, "slots": slots}


def _describe(options: SweepOptions, job: SweepJob, task: Task, steps: int) -> str:
    runs = len(job.names)
    return (
        f"{describe_rows(task.data)} of {options.length} tokens; {count(runs, 'run')} of "
        f"{count(steps, 'step')} of {count(options.size, 'row')}, {job.sweep.slots} at once"
    )
