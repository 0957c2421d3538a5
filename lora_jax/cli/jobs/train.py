"""What `lora-jax train` does: a model and files in, a trained adapter out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import lora_jax as lora
from lora_jax.cli.jobs import train_results
from lora_jax.cli.jobs.train_data import Task, read_task
from lora_jax.cli.jobs.train_model import open_model
from lora_jax.cli.targets import resolve
from lora_jax.cli.train_options import CLASSIFICATION, MEAN, TrainOptions
from lora_jax.core.foreign import escaped
from lora_jax.training import log, loss_curve, progress, run_record
from lora_jax.training.errors import TrainingError
from lora_jax.training.interrupt import interruptible
from lora_jax.training.loop import Job, Outcome, Settings, Watcher, steps_of_epochs, train
from lora_jax.training.optimizer import Optimizer


def main(options: TrainOptions, command: str) -> None:
    """Train, write the adapter, the log and the plot, and print a summary.

    Args:
      options: of the command line.
      command: the command that would resume this run.

    Raises:
      KeyboardInterrupt: after Ctrl-C or SIGTERM, once all is saved; it says how to resume.
    """
    console = Console(stderr=True, highlight=False)
    say = lambda text: console.print(escaped(text), markup=False, soft_wrap=True)
    optimizer = _optimizer(options)
    now = run_record.started(options.out, options.resume)
    model = open_model(options.model, options.dtype, options.scan, now)
    length = options.length or min(512, model.longest)
    if not 2 <= length <= model.longest:
        raise TrainingError(f"--length {length}: must be from 2 to {model.longest} for this model")
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
        _settings_to_record(options, config, steps), task.params, task.data, task.held_out, now
    )
    if not run_record.begin(options.out, this, options.resume) and options.resume:
        say(f"nothing to resume in {options.out}: starting from the beginning")
    counts = lora.count_params(start)
    say(
        f"{len(task.data):,} rows of {length} tokens, {steps:,} steps of "
        f"{options.size} rows; {counts.trainable:,} trainable parameters, "
        f"{counts.trainable / counts.total:.2%} of all"
    )
    results = train_results.Results(options, task, model.naming, config, start)
    outcome = _train_watched(job, adapters, results, console, say)
    loss_curve.draw(outcome.records, options.out / "loss.png")
    if outcome.step < steps:
        raise KeyboardInterrupt(f"step {outcome.step} of {steps} is saved; to resume: {command}")
    path = results.write("adapter", outcome.adapters, {"step": outcome.step})
    train_results.show(outcome.records, [path, options.out / "log.jsonl", options.out / "loss.png"])


def _config(options: TrainOptions, targets: list[str], whole: tuple[str, ...]) -> lora.LoraConfig:
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


def _optimizer(options: TrainOptions) -> Optimizer:
    return Optimizer(
        learning_rate=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        clip=options.clip,
        weight_decay=options.weight_decay,
        b_ratio=options.lora_plus,
    )


def _job(
    options: TrainOptions, optimizer: Optimizer, task: Task, targets: list[str], start: Any
) -> tuple[Job, Any]:
    """Return what to train, and the initial adapters."""
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


#: Options that a resumed run may change, or that are recorded by other means. All others, new ones
#: too, must stay the same.
_NOT_RECORDED = {
    *("out", "resume", "eval_every", "save_every"),
    *("data", "held_out", "eval_split", "eval_rows", "encoding"),  # by a checksum of the batches
    "pooling",  # of a classifier only
    *("model", "dtype"),  # by a checksum of the parameters
    *("epochs", "targets", "init", "rank", "alpha", "dora", "rslora", "dropout"),  # by the config
}


def _settings_to_record(
    options: TrainOptions, config: lora.LoraConfig, steps: int
) -> dict[str, Any]:
    """Return all that decides what a step computes, under the names of the command line."""
    given = {name: value for name, value in vars(options).items() if name not in _NOT_RECORDED}
    if options.task == CLASSIFICATION and options.pooling != MEAN:  # which was once the only one
        given["pooling"] = options.pooling
    return {
        **given,
        "steps": steps,
        **{name: value for name, value in config.to_dict().items() if name != "dtype"},
    }


def _train_watched(
    job: Job,
    adapters: Any,
    results: train_results.Results,
    console: Console,
    say: Callable[[str], None],
) -> Outcome:
    """Train under a progress bar, until it is done or the process is asked to stop."""
    with interruptible() as interrupt, progress.bar(console, job.settings.steps) as told:

        def watch(record: log.Record) -> None:
            told(record)
            if "eval_loss" in record:
                say(f"step {record['step']}, {progress.describe(record)}")

        def best(adapters: Any, record: log.Record) -> None:
            results.write("best", adapters, record)

        return train(job, adapters, Watcher(interrupt, watch, best))
