"""What `lora-jax train` does: a model and files in, a trained adapter out."""

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

from rich.console import Console

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.jobs import train_remat, train_results
from lora_jax.cli.jobs.train_data import Task, read_task
from lora_jax.cli.jobs.train_model import TrainableModel, open_model
from lora_jax.cli.jobs.train_start import Start, make_start
from lora_jax.cli.jobs.train_stream import choose_streaming, describe_rows
from lora_jax.cli.jobs.train_vocabulary import Vocabulary
from lora_jax.cli.jobs.train_watch import Watch
from lora_jax.cli.plurals import count
from lora_jax.cli.train_options import CLASSIFICATION, MEAN, TrainOptions
from lora_jax.cli.words import in_options
from lora_jax.core.foreign import escaped
from lora_jax.files import kinds
from lora_jax.training import loss_curve, run_record
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Job, Settings, steps_of_epochs, train
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
    resumed = run_record.check_directory(options.out, options.resume)
    if options.resume and not resumed:
        say(f"nothing to resume in {options.out}: starting from the beginning")
    optimizer = _optimizer(options)
    now = run_record.started(options.out, options.resume)
    announce = say if console.is_terminal else lambda text: None
    options = choose_streaming(options, resumed)
    options, model = _open(options, now, announce)
    announce(f"reading {', '.join(map(str, [*options.data, *(options.held_out or ())]))}")
    task = read_task(options, model)
    for note in task.notes:
        say(f"note: {note}")
    with in_options(options):
        start = make_start(options, model, task)
    base, adapters = lora.split(start.params)
    steps = _steps(options, task, resumed)
    this = run_record.identity(
        _settings_to_record(options, start, adapters, steps),
        task.params,
        task.data,
        task.held_out,
        now,
        run_record.older_checksums(options.out) if resumed else (),
    )
    results = train_results.Results(
        options,
        task,
        model.naming,
        start.config,
        start.params,
        model.tokenizer.files() if options.add_token else {},
    )
    results.check(adapters)
    job = _job(options, optimizer, model, task, start, base, adapters, steps)
    job = train_remat.choose(options, model, task, start.paths, job, adapters, say)
    run_record.begin(options.out, this, resumed, free=("steps",))
    for line in _describe(options, task, start, steps):
        say(line)
    with Watch(results, steps, optimizer, this, command, console) as watch:
        outcome = train(job, adapters, watch.watcher)
    title = f"{options.model}: rank {start.config.rank}, learning rate {options.lr:g}"
    loss_curve.draw(outcome.records, options.out / "loss.png", title)
    if outcome.step < steps:
        raise KeyboardInterrupt(watch.describe_interruption(outcome.step))
    results.show(outcome.records)


def _describe(options: TrainOptions, task: Task, start: Start, steps: int) -> tuple[str, str]:
    """Return what is trained on, and how much trains."""
    counts = lora.count_params(start.params)
    return (
        f"{describe_rows(task.data)} of {options.length} tokens, "
        f"{count(steps, 'step')} of {count(options.size, 'row')}",
        f"{count(counts.trainable, 'trainable parameter')}, "
        f"{counts.trainable / counts.total:.2%} of all",
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


def _open(
    options: TrainOptions, now: datetime.datetime, say: Callable[[str], None]
) -> tuple[TrainOptions, TrainableModel]:
    """Return the model, and the options with the length and the form of layers that it has."""
    scan = options.scan
    if options.adapter is not None:
        found = kinds.adapter(options.adapter)
        if found.kind == kinds.NATIVE:  # the others have one name per layer
            scan = sources.is_stacked(found)
    vocabulary = Vocabulary(options.add_token or (), options.untie_head)
    model = open_model(
        options.model, options.dtype, scan, options.adapter, now, say, vocabulary=vocabulary
    )
    length = options.length or min(512, model.longest)
    if not 2 <= length <= model.longest:
        raise TrainingError(f"--length {length}: must be from 2 to {model.longest} for this model")
    return dataclasses.replace(options, length=length, scan=scan), model


def _steps(options: TrainOptions, task: Task, resumed: bool) -> int:
    """Return how many steps to train: those requested, else the run's own, else one epoch."""
    if options.steps is not None:
        return options.steps
    if resumed and options.epochs is None:
        before = run_record.recorded(options.out, "steps")
        if isinstance(before, int) and before > 0:
            return before
    return steps_of_epochs(options.epochs or 1.0, task.data, options.size)


def _job(
    options: TrainOptions,
    optimizer: Optimizer,
    model: TrainableModel,
    task: Task,
    start: Start,
    base: Any,
    adapters: Any,
    steps: int,
) -> Job:
    settings = Settings(
        steps=steps,
        rows=options.batch,
        accumulate=options.accumulate,
        seed=options.seed,
        shuffle=options.shuffle,
        eval_every=options.eval_every,
        save_every=options.save_every,
        profile=options.profile,
    )
    return Job(
        loss=task.loss(model, start.paths),
        base=base,
        tx=optimizer.transformation(adapters, steps),
        rates=optimizer.rates(steps),
        data=task.data,
        held_out=task.held_out,
        settings=settings,
        directory=options.out,
    )


#: Options that a resumed run may change, or that are recorded by other means. All others, new ones
#: too, must stay the same.
_NOT_RECORDED = {
    *("out", "resume", "eval_every", "save_every", "log_every", "base_name"),
    *("data", "held_out", "eval_split", "eval_rows", "encoding"),  # by a checksum of the batches
    "stream",  # of a run that streams only
    *("compile_cache", "profile"),  # which change no result
    "pooling",  # of a classifier only
    *("model", "dtype"),  # by a checksum of the parameters
    *("epochs", "targets", "init", "rank", "alpha", "dora", "rslora", "dropout"),  # by the config
    *("exclude", "layers", "train", "bias"),  # by the config
    "adapter",  # by a checksum of its values
    *("remat", "memory"),  # the same numbers, computed again or not
    *("add_token", "untie_head"),  # by the config and the checksums of the parameters and batches
}


def _settings_to_record(
    options: TrainOptions, start: Start, adapters: Any, steps: int
) -> dict[str, Any]:
    """Return all that decides what a step computes, under the names of the command line."""
    given = {name: value for name, value in vars(options).items() if name not in _NOT_RECORDED}
    if options.task == CLASSIFICATION and options.pooling != MEAN:  # which was once the only one
        given["pooling"] = options.pooling
    if options.stream:
        given["stream"] = True
    adapter = (
        {}
        if options.adapter is None
        else {"the checksum of --adapter": run_record.checksum(adapters)}
    )
    config = start.config.to_dict()
    return {
        **given,
        **adapter,
        "steps": steps,
        **{name: value for name, value in config.items() if name != "dtype"},
    }
