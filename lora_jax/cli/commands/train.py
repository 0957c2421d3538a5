"""`lora-jax train`: fine-tune a model on a file."""

import shlex

import typer

from lora_jax.cli.parameters.takes import takes
from lora_jax.cli.train_options import (
    CAUSAL_LM,
    CLASSIFICATION,
    CPO,
    DPO,
    ON_PAIRS,
    PREFERENCES,
    REPORTS,
    SIMPO,
    TrainOptions,
)
from lora_jax.core.foreign import shown

EXAMPLES = (
    "lora-jax train --model smollm2 --data play.txt --targets q_proj,v_proj --out run",
    "lora-jax train --model ./llama-1b --data chats.jsonl --eval-split 0.1 --epochs 3 --out run",
    "lora-jax train --model ./MiniLM --task classification --data reviews.jsonl --out run",
    "lora-jax train --model ./llama-1b --task dpo --data preferences.jsonl --out run",
    "lora-jax train --model tiny --data notes.txt --steps 20 --out run --resume",
    "lora-jax train --model ./llama-8b --data chats.jsonl --mesh fsdp=4,tensor=2 --out run",
)


@takes(TrainOptions)
def command(context: typer.Context, options: TrainOptions) -> None:
    """Fine-tune a model on a file with LoRA.

    A .txt file is one text. All rows of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file are
    of one kind: {"text"}, {"prompt", "completion"}, {"messages": [{"role", "content"}, ...]}, or,
    for classification, {"text", "label"}, or, for dpo, orpo, cpo and simpo, {"prompt", "chosen",
    "rejected"}; ShareGPT's and Alpaca's keys are messages. The loss ignores prompts and users'
    turns. Short texts share a row without attending to one another.

    Ctrl-C finishes the steps under way, saves, and prints the command that resumes. At the end,
    --out contains adapter/ in PEFT's format (adapter.safetensors for a classifier, model/ with
    --full), best/ for the lowest evaluation loss, log.jsonl, loss.png, and checkpoints/ for
    --resume.
    """
    check(context, options)
    from lora_jax.cli import compile_cache
    from lora_jax.cli.jobs.training import train

    with compile_cache.compile_cache(options.compile_cache):
        train.main(options, resume_command(context))


#: Options that must be above 0, or at least 0; infinite values are refused too.
_POSITIVE = ("lr", "lora_plus", "alpha", "memory", "beta")
_NOT_NEGATIVE = ("warmup", "clip", "weight_decay", "router_loss", "gamma")

#: Options -> the tasks that they are for, and losses of --task dpo.
_OF_TASKS = {
    "beta": PREFERENCES,
    "dpo_loss": (DPO,),
    "label_smoothing": (DPO, CPO),
    "reference": (DPO,),
    "gamma": (SIMPO,),
    "router_loss": (CAUSAL_LM,),
}
_SMOOTHED = ("sigmoid", "robust")

#: Options of new adapters, which an adapter to start from decides.
_OF_NEW_ADAPTERS = (
    *("rank", "alpha", "targets", "exclude", "layers", "last_layers", "train", "bias"),
    *("init", "dora", "rslora", "add_token", "untie_head"),
)


def check(context: typer.Context, options: TrainOptions) -> None:
    """Raise `BadParameter` for values without meaning, and for options that exclude each other."""
    if options.steps is not None and options.epochs is not None:
        raise typer.BadParameter("give either --steps or --epochs, not both")
    _check_evaluation(options)
    if options.layers and options.last_layers is not None:
        raise typer.BadParameter("give either --layers or --last-layers, not both")
    if not options.mask_prompt and options.task != CAUSAL_LM:
        raise typer.BadParameter("--no-mask-prompt is for --task causal-lm")
    if options.lora_plus != 1 and options.optimizer in ON_PAIRS:
        raise typer.BadParameter(
            f"--optimizer {options.optimizer} updates A and B together; leave out --lora-plus"
        )
    for name in set(options.report or ()).difference(REPORTS):
        known = ", ".join(map(repr, REPORTS))
        raise typer.BadParameter(
            f"{shown(repr(name))} is not one of {known}", param_hint="--report"
        )
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(options, name)
        is_wrong = value is not None and not (0 <= value < float("inf"))
        if is_wrong or (value == 0 and name in _POSITIVE):
            what = "above 0" if name in _POSITIVE else "at least 0"
            what = "finite" if value == float("inf") else what
            raise typer.BadParameter(f"must be {what}", param_hint=f"--{name.replace('_', '-')}")
    together = ("coordinator", "processes", "process_id")
    missing = [f"--{n.replace('_', '-')}" for n in together if getattr(options, n) is None]
    if 0 < len(missing) < len(together):
        raise typer.BadParameter(
            f"--coordinator, --processes and --process-id go together; add {' and '.join(missing)}"
        )
    if (options.process_id or 0) >= (options.processes or 1):
        raise typer.BadParameter(
            f"must be below --processes {options.processes}", param_hint="--process-id"
        )
    if options.merge_aware and (options.quantize is None or options.dropout):
        raise typer.BadParameter("--merge-aware is for --quantize, and without --dropout")
    _check_preferences(context, options)
    if options.task == CLASSIFICATION and (options.add_token or options.untie_head):
        raise typer.BadParameter("--add-token and --untie-head are for --task causal-lm")
    if options.full:
        _check_full(context, options)
    given = [n for n in _OF_NEW_ADAPTERS if options.adapter is not None and _is_given(context, n)]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"--adapter decides what trains, and how; leave out {named}")


#: Options of adapters alone.
_OF_ADAPTERS = (
    *("adapter", "rank", "alpha", "targets", "train", "bias", "init", "dora", "rslora"),
    *("dropout", "lora_plus", "quantize", "merge_aware", "base_name", "pooling"),
)


def _check_full(context: typer.Context, options: TrainOptions) -> None:
    if options.task == CLASSIFICATION:
        raise typer.BadParameter("--full is not for --task classification; train an adapter")
    given = [f"--{n.replace('_', '-')}" for n in _OF_ADAPTERS if _is_given(context, n)]
    if given:
        raise typer.BadParameter(f"--full trains all weights; leave out {', '.join(given)}")
    if options.optimizer in ON_PAIRS:
        raise typer.BadParameter(
            f"--optimizer {options.optimizer} is for adapters; choose another one for --full"
        )


def _check_preferences(context: typer.Context, options: TrainOptions) -> None:
    for name, tasks in _OF_TASKS.items():
        if options.task not in tasks and _is_given(context, name):
            raise typer.BadParameter(
                f"is for --task {' or '.join(tasks)}", param_hint=f"--{name.replace('_', '-')}"
            )
    if not 0 <= options.label_smoothing < 0.5:
        raise typer.BadParameter("must be from 0 to below 0.5", param_hint="--label-smoothing")
    if options.task == DPO and options.label_smoothing and options.dpo_loss not in _SMOOTHED:
        raise typer.BadParameter(f"--label-smoothing is for --dpo-loss {' and '.join(_SMOOTHED)}")


def _check_evaluation(options: TrainOptions) -> None:
    if options.held_out and options.eval_split:
        raise typer.BadParameter("give either --eval or --eval-split, not both")
    if options.eval_rows and options.val_batches:
        raise typer.BadParameter("give either --eval-rows or --val-batches, not both")
    for flag in [name for name in ("patience", "load_best") if getattr(options, name)]:
        if not options.held_out and not options.eval_split:
            raise typer.BadParameter(
                f"--{flag.replace('_', '-')} needs held-out data; add --eval or --eval-split"
            )
    if options.patience and not options.eval_every:
        raise typer.BadParameter("--patience counts evaluations; add --eval-every")


def _is_given(context: typer.Context, name: str) -> bool:
    """Return whether an option has another value than its default, by a word or by --config.

    The command may lack it: `sweep` has some of the options of `train`.
    """
    defaults = [p.default for p in context.command.params if p.name == name]
    return any(context.params[name] not in (default, (), []) for default in defaults)


def resume_command(context: typer.Context) -> str:
    """Return the command that resumes this run: the given options, and --resume."""
    words = context.command_path.split()
    in_file = context.default_map or {}
    for parameter in context.command.params:
        name = parameter.name or ""
        value, source = context.params[name], context.get_parameter_source(name)
        is_default = value == parameter.default and name not in in_file
        if name == "resume" or is_default or source is None or source.name != "COMMANDLINE":
            continue
        flags = [*parameter.opts, *parameter.secondary_opts]
        if isinstance(value, bool):
            words.append(flags[0] if value else flags[-1])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [flags[0], str(one)]
    return shlex.join([*words, "--resume"])
