"""What `lora-jax train` does: a model and files in, a trained adapter out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import lora_jax as lora
from lora_jax.cli.base_model import open_model
from lora_jax.cli.jobs import train_results
from lora_jax.cli.jobs.train_data import Task, read_task
from lora_jax.cli.targets import resolve
from lora_jax.cli.train_options import Options
from lora_jax.training import log, loss_curve, progress, run_record
from lora_jax.training.errors import TrainingError
from lora_jax.training.interrupt import interruptible
from lora_jax.training.loop import Job, Outcome, Settings, Watcher, steps_of_epochs, train
from lora_jax.training.optimizer import Optimizer


def main(options: Options, command: str) -> None:
    """Trains, writes the adapter, the log and the picture, and prints what came of it.

    Args:
      options: of the command line.
      command: the command that would go on with this run.

    Raises:
      KeyboardInterrupt: after Ctrl-C or SIGTERM, once all is saved; it says how to go on.
    """
    console = Console(stderr=True, highlight=False)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)
    optimizer = _optimizer(options)
    model = open_model(options.model, options.dtype, options.scan)
    length = options.length or min(512, model.longest)
    if not 2 <= length <= model.longest:
        raise TrainingError(f"--length {length}: this model takes 2 to {model.longest}")
    options = dataclasses.replace(options, length=length)
    task = read_task(options, model)
    for note in task.notes:
        say(f"note: {note}")
    targets = [
        task.prefix + path for path in resolve(options.target_names, model.params, model.naming)
    ]
    config = _config(options, targets, task.whole)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    start = lora.init(jax.random.key(options.seed), task.params, config, task.apply, ids, ids)
    job, adapters = _job(options, optimizer, task, targets, start)
    steps = job.settings.steps
    this = run_record.identity(
        _recorded(options, config, steps), task.params, task.data, task.held_out
    )
    if not run_record.begin(options.out, this, options.resume) and options.resume:
        say(f"nothing to resume in {options.out}: starting at the beginning")
    counts = lora.count_params(start)
    say(
        f"{len(task.data):,} rows of {length} tokens, {steps:,} steps of "
        f"{options.size} rows; {counts.trainable:,} parameters train, "
        f"{counts.trainable / counts.total:.2%} of all"
    )
    results = train_results.Results(options, task, model.naming, config, start)
    outcome = _watched(job, adapters, results, console, say)
    loss_curve.draw(outcome.records, options.out / "loss.png")
    if outcome.step < steps:
        raise KeyboardInterrupt(f"step {outcome.step} of {steps} is saved; to go on: {command}")
    path = results.write("adapter", outcome.adapters, {"step": outcome.step})
    train_results.show(outcome.records, [path, options.out / "log.jsonl", options.out / "loss.png"])


def _config(options: Options, targets: list[str], whole: tuple[str, ...]) -> lora.LoraConfig:
    return lora.LoraConfig(
        targets=targets,
        train=whole,
        rank=options.rank,
        alpha=options.alpha,
        init=options.init,
        dora=options.dora,
        scaling="rslora" if options.rslora else "standard",
        dropout=options.dropout,
    )


def _optimizer(options: Options) -> Optimizer:
    return Optimizer(
        learning_rate=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        clip=options.clip,
        weight_decay=options.weight_decay,
        b_ratio=options.lora_plus,
    )


def _job(
    options: Options, optimizer: Optimizer, task: Task, targets: list[str], start: Any
) -> tuple[Job, Any]:
    """What to train, and the adapters to start with."""
    base, adapters = lora.split(start)
    steps = options.steps or steps_of_epochs(options.epochs, task.data, options.size)
    settings = Settings(
        steps=steps,
        rows=options.batch,
        accumulate=options.accumulate,
        seed=options.seed,
        shuffle=options.shuffle,
        eval_every=options.eval_every,
        save_every=options.save_every,
    )
    job = Job(
        loss=task.loss(targets),
        base=base,
        tx=optimizer.transformation(adapters, steps),
        rates=optimizer.rates(steps),
        data=task.data,
        held_out=task.held_out,
        settings=settings,
        directory=options.out,
    )
    return job, adapters


def _recorded(options: Options, config: lora.LoraConfig, steps: int) -> dict[str, Any]:
    """All that decides what a step computes, under the names of the command line."""
    names = (
        *("task", "length", "batch", "accumulate", "seed", "shuffle", "scan"),
        *("lr", "schedule", "warmup", "clip", "weight_decay", "lora_plus"),
    )
    return {
        **{name: getattr(options, name) for name in names},
        "steps": steps,
        **{name: value for name, value in config.to_dict().items() if name != "dtype"},
    }


def _watched(
    job: Job,
    adapters: Any,
    results: train_results.Results,
    console: Console,
    say: Callable[[str], None],
) -> Outcome:
    """Trains under a progress bar, until it is done or the process is asked to stop."""
    with interruptible() as interrupt, progress.bar(console, job.settings.steps) as told:

        def watch(record: log.Record) -> None:
            told(record)
            if "eval_loss" in record:
                say(f"step {record['step']}, {progress.describe(record)}")

        def best(adapters: Any, record: log.Record) -> None:
            results.write("best", adapters, record)

        return train(job, adapters, Watcher(interrupt, watch, best))
