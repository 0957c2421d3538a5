"""What `lora-jax train` does: a model and files in, a trained adapter out."""

import dataclasses
import datetime
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh
from rich.console import Console

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.cli.jobs.training import choose_remat, on_mesh
from lora_jax.cli.jobs.training.data import Task, read_task
from lora_jax.cli.jobs.training.model import TrainableModel, open_model, with_remat
from lora_jax.cli.jobs.training.reference import add_reference
from lora_jax.cli.jobs.training.reports import Reports
from lora_jax.cli.jobs.training.results import Results
from lora_jax.cli.jobs.training.start import Start, make_start
from lora_jax.cli.jobs.training.stream import choose_streaming, describe_rows
from lora_jax.cli.jobs.training.vocabulary import Vocabulary
from lora_jax.cli.jobs.training.watch import Watch
from lora_jax.cli.jobs.training.whole_model import WholeModels
from lora_jax.cli.plurals import count
from lora_jax.cli.train_options import (
    CLASSIFICATION,
    MEAN,
    OF_PREFERENCES,
    PREFERENCES,
    TrainOptions,
)
from lora_jax.cli.words import in_options
from lora_jax.core.errors import LoraError
from lora_jax.core.foreign import escaped
from lora_jax.files import kinds
from lora_jax.files.disk import processes
from lora_jax.training import loss_curve, run_record
from lora_jax.training.distributed.placing import complete, own_rows, place_rows
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Job, Outcome, Settings, steps_of_epochs, train
from lora_jax.training.optimizer import Optimizer
from lora_jax.training.optimizers.kinds import ADAMW
from lora_jax.training.reporting.reporters import require
from lora_jax.training.running.step_memory import needed_bytes, widened_bytes


def main(options: TrainOptions, command: str) -> None:
    """Train, write the adapter, the log and the plot, and print a summary.

    Args:
      options: of the command line.
      command: the command that would resume this run.

    Raises:
      KeyboardInterrupt: after Ctrl-C or SIGTERM, once all is saved; it says how to resume.
    """
    on_mesh.join(options)
    processes.together(lambda: _run(options, command), errors=LoraError)


def _run(options: TrainOptions, command: str) -> None:
    """Do what `main` says, in each of the run's processes; process 0 alone writes and speaks."""
    console = Console(stderr=True, highlight=False, quiet=not processes.is_first())
    say = lambda text: console.print(escaped(text), markup=False, soft_wrap=True)
    resumed = processes.together(lambda: run_record.check_directory(options.out, options.resume))
    if options.resume and not resumed:
        say(f"nothing to resume in {options.out}: starting from the beginning")
    optimizer = optimizer_of(options)
    for name in options.report or ():
        require(name)
    now = started(options)
    announce = say if console.is_terminal else lambda text: None
    options = processes.together(partial(choose_streaming, options, resumed))
    processes.by_first(lambda: sources.find_model(options.model, announce))  # or downloads it
    options, model, mesh = processes.together(lambda: open_run(options, now, announce))
    announce(f"reading {', '.join(map(str, [*options.data, *(options.held_out or ())]))}")
    task = processes.together(lambda: read_task(options, model))
    task = dataclasses.replace(task, params=complete(task.params, mesh))
    for note in task.notes:
        say(f"note: {note}")
    with in_options(options):
        start = make_start(options, model, task)
    start = dataclasses.replace(start, params=complete(start.params, mesh))
    base, adapters = lora.split(start.params)
    steps = steps_of(options, task, resumed)
    this = run_record.identity(
        settings_to_record(options, start, adapters, steps),
        task.params,
        task.data,
        task.held_out,
        now,
        run_record.older_checksums(options.out) if resumed else (),
    )
    results = _results(options, model, task, start)
    results.check(adapters)
    job = _job(options, optimizer, model, task, start, base, adapters, steps, mesh)
    with on_mesh.in_use(mesh):
        loss = lambda remat: task.loss(with_remat(model, remat), start.paths)
        needed = lambda remat: needed_bytes(dataclasses.replace(job, loss=loss(remat)), adapters)
        remat = choose_remat.choose(options, needed, say)
    job = dataclasses.replace(job, loss=loss(remat))
    processes.by_first(lambda: run_record.begin(options.out, this, resumed, free=("steps",)))
    for line in describe(options, task, start, steps):
        say(line)
    for line in [] if mesh is None else on_mesh.describe(mesh, model.config):
        say(line)
    reports = Reports(options.report or (), options.out, this["settings"], say)
    watch = Watch(results, steps, optimizer, this, command, console, reports)
    with on_mesh.in_use(mesh):
        data = add_reference(options, model, task, start, say, mesh)
    job = dataclasses.replace(job, **data)
    with watch:  # to the end: a second signal may come while the picture is drawn
        with on_mesh.in_use(mesh), watch.progress():
            outcome = train(job, adapters, watch.watcher)
        _finish(outcome, steps, results, watch)


def _results(options: TrainOptions, model: TrainableModel, task: Task, start: Start) -> Results:
    """Return how what the run leaves is written."""
    tokenizer = model.tokenizer.files() if options.add_token else {}
    given = (options, task, model.naming, start.config, start.params, tokenizer)
    return WholeModels(*given, model=model.loaded) if options.full else Results(*given)


def _finish(outcome: Outcome, steps: int, results: Results, watch: Watch) -> None:
    """Draw the losses, and say what was written, or how to continue."""
    options = results.options
    how = "all weights" if options.full else f"rank {results.config.rank}"
    title = f"{options.model}: {how}, learning rate {options.lr:g}"
    picture = options.out / "loss.png"
    processes.by_first(lambda: loss_curve.draw(outcome.records, picture, title))
    is_interrupted = outcome.step < steps and not outcome.ended_early
    if is_interrupted and processes.is_first():
        raise KeyboardInterrupt(watch.describe_interruption(outcome.step))
    if is_interrupted:
        raise SystemExit(INTERRUPTED)
    if outcome.ended_early:
        watch.say(
            f"ended after step {outcome.step} of {steps}: the held-out loss has not fallen in "
            f"{count(options.patience, 'evaluation')} (--patience)"
        )
    if options.load_best:
        processes.by_first(results.keep_best)
    if processes.is_first():
        results.show(outcome.records)


def started(options: TrainOptions) -> datetime.datetime:
    """Return when the run was started, by the clock of process 0."""
    now = processes.together(lambda: run_record.started(options.out, options.resume))
    return datetime.datetime.fromisoformat(processes.tell_all(now.isoformat())[0])


_WORTH_A_LINE = 1e8  # bytes of copies


def describe(options: TrainOptions, task: Task, start: Start, steps: int) -> list[str]:
    """Return what is trained on, how much trains, and what a CPU makes of a narrow dtype."""
    counts = lora.count_params(start.params)
    widened = widened_bytes(start.params)
    copies = (
        "this CPU computes 16-bit weights in float32 and keeps float32 copies of them: about "
        f"{widened / 1e9:.1f} GB more; --dtype float32 needs less memory"
    )
    return [
        f"{describe_rows(task.data)} of {options.length} tokens, "
        f"{count(steps, 'step')} of {count(options.size, 'row')}",
        f"{count(counts.trainable, 'trainable parameter')}, "
        f"{counts.trainable / counts.total:.2%} of all",
        *([copies] if widened >= _WORTH_A_LINE else []),
    ]


def optimizer_of(options: TrainOptions) -> Optimizer:
    return Optimizer(
        learning_rate=options.lr,
        schedule=options.schedule,
        warmup=options.warmup,
        clip=options.clip,
        weight_decay=options.weight_decay,
        b_ratio=options.lora_plus,
        name=options.optimizer,
    )


Options = TypeVar("Options", bound=TrainOptions)


def open_run(
    options: Options, now: datetime.datetime, say: Callable[[str], None]
) -> tuple[Options, TrainableModel, Mesh | None]:
    """Return the model on its mesh, and the options with the length and layers that it has."""
    scan = options.scan
    if options.adapter is not None:
        found = kinds.adapter(options.adapter)
        if found.kind == kinds.NATIVE:  # the others have one name per layer
            scan = sources.is_stacked(found)
    vocabulary = Vocabulary(options.add_token or (), options.untie_head)
    mesh = on_mesh.open_mesh(options)
    model = open_model(
        *(options.model, options.dtype, scan, options.adapter, now, say),
        vocabulary=vocabulary,
        mesh=mesh,
        quantize=options.quantize,
    )
    options = _with_last_layers(options, model)
    length = options.length or min(512, model.longest)
    if not 2 <= length <= model.longest:
        raise TrainingError(f"--length {length}: must be from 2 to {model.longest} for this model")
    return dataclasses.replace(options, length=length, scan=scan), model, mesh


def _with_last_layers(options: Options, model: TrainableModel) -> Options:
    """Return the options with --last-layers as --layers."""
    count, there = options.last_layers, model.config.num_hidden_layers
    if count is None:
        return options
    if count > there:
        raise TrainingError(f"--last-layers {count}: the model has {there} layers")
    return dataclasses.replace(options, layers=f"-{count}:")


def steps_of(options: TrainOptions, task: Task, resumed: bool) -> int:
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
    mesh: Mesh | None,
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
        patience=options.patience,
        merge_aware=options.merge_aware,
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
        place=jax.device_put if mesh is None else place_rows(mesh),
        own_rows=None if mesh is None else own_rows(mesh, options.size),
    )


#: Options that a resumed run may change, or that are recorded by other means. All others, new ones
#: too, must stay the same.
_NOT_RECORDED = {
    *("mesh", "coordinator", "processes", "process_id"),
    *("out", "resume", "eval_every", "save_every", "log_every", "base_name"),
    *("data", "held_out", "eval_split", "eval_rows", "val_batches"),  # by a checksum of the batches
    *("encoding", "mask_prompt", "field"),  # likewise
    *("patience", "load_best"),  # when a run ends, and which adapter it leaves
    "stream",  # of a run that streams only
    *("compile_cache", "profile", "report"),  # which change no result
    "full",  # by the config
    "pooling",  # of a classifier only
    "merge_aware",  # of a quantized base only
    "router_loss",  # of models with experts only
    "optimizer",  # other than the one that runs of older releases had
    *("model", "dtype"),  # by a checksum of the parameters
    *("epochs", "targets", "init", "rank", "alpha", "dora", "rslora", "dropout"),  # by the config
    *("exclude", "layers", "last_layers", "train", "bias"),  # by the config
    "adapter",  # by a checksum of its values
    *OF_PREFERENCES,  # of preference tuning only
    *("remat", "memory"),  # the same numbers, computed again or not
    *("add_token", "untie_head"),  # by the config and the checksums of the parameters and batches
}


def settings_to_record(
    options: TrainOptions, start: Start, adapters: Any, steps: int
) -> dict[str, Any]:
    """Return all that decides what a step computes, under the names of the command line."""
    given = {name: value for name, value in vars(options).items() if name not in _NOT_RECORDED}
    if options.task == CLASSIFICATION and options.pooling != MEAN:  # which was once the only one
        given["pooling"] = options.pooling
    if options.task in PREFERENCES:
        given |= {name: getattr(options, name) for name in OF_PREFERENCES}
    if options.stream:
        given["stream"] = True
    if options.merge_aware:
        given["merge_aware"] = True
    if options.router_loss:
        given["router_loss"] = options.router_loss
    if options.optimizer != ADAMW:
        given["optimizer"] = options.optimizer
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
