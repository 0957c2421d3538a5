"""`lora-jax train`: fine-tune a model on a file."""

from __future__ import annotations

import enum
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = (
    "lora-jax train --model smollm2 --data play.txt --targets q_proj,v_proj --out run",
    "lora-jax train --model Llama-3.2-1B --data chats.jsonl --eval-split 0.1 --epochs 3 --out run",
    "lora-jax train --model MiniLM --task classification --data reviews.jsonl --out run",
    "lora-jax train --model tiny --data notes.txt --steps 20 --out run --resume",
)


class Task(enum.StrEnum):
    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "classification"


class Init(enum.StrEnum):
    KAIMING = "kaiming"
    GAUSSIAN = "gaussian"
    ORTHOGONAL = "orthogonal"
    PISSA = "pissa"
    PISSA_FAST = "pissa_fast"
    OLORA = "olora"


class Dtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Schedule(enum.StrEnum):
    COSINE = "cosine"
    CONSTANT = "constant"


_MODEL = "A directory in Hugging Face's layout, a .gguf file, or a name: smollm2, tiny."
_DATA = "A .jsonl file of rows, or a .txt file; may be given several times."
_OUT = "The run's directory: adapter, checkpoints, log."
_SHUFFLE = "A new order of the rows each epoch, or the files' order, packed less tightly."
_TARGETS = "What to adapt, by commas: torch's names, paths of the tree, or all-linear."


def command(
    context: typer.Context,
    model: Annotated[str, typer.Option(metavar="MODEL", help=_MODEL)],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help=_DATA)],
    out: Annotated[Path, typer.Option(metavar="DIR", help=_OUT)],
    task: Annotated[Task, typer.Option(help="What to learn.")] = Task.CAUSAL_LM,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Files to judge by, of the same kind."),
    ] = None,
    eval_split: Annotated[
        float, typer.Option(min=0, max=0.9, help="Or the share of the data to judge by.")
    ] = 0.0,
    eval_rows: Annotated[
        int, typer.Option(min=0, help="Judge by at most so many rows; 0: all.")
    ] = 0,
    encoding: Annotated[str, typer.Option(help="Of the data files.")] = "utf-8",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="The scale is alpha / rank; without it, 1.")
    ] = None,
    targets: Annotated[str, typer.Option(help=_TARGETS)] = "all-linear",
    init: Annotated[Init, typer.Option(help="How A and B start.")] = Init.KAIMING,
    dora: Annotated[bool, typer.Option("--dora", help="A magnitude for every output.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank.")] = False,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="In the branches.")] = 0.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.001, help="Times through the data.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 1,
    length: Annotated[
        int, typer.Option(min=0, help="Tokens read of a row; 0: 512, or all the model takes.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    schedule: Annotated[Schedule, typer.Option(help="After the warm-up.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(help="Steps; below 1 a share of all.")] = 0.05,
    clip: Annotated[float, typer.Option(help="Of the gradients' norm; 0 for none.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Of A and B.")] = 0.0,
    lora_plus: Annotated[float, typer.Option(help="B learns so many times faster.")] = 1.0,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps; 0: first and last.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: the last alone.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of start, order and dropout.")] = 0,
    shuffle: Annotated[bool, typer.Option(help=_SHUFFLE)] = True,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the frozen model; without it, the file's.")
    ] = None,
    scan: Annotated[
        bool, typer.Option(help="Layers in a loop: compiles faster, is slower on a CPU.")
    ] = False,
) -> None:
    """Fine-tune a model on a file with LoRA.

    A .txt file is one text. The rows of a .jsonl file are of one kind: {"text"}, {"prompt",
    "completion"}, {"messages": [{"role", "content"}, ...]}, or, to classify, {"text", "label"}.
    Prompts and users' turns are read, not learned; short texts share rows and do not see one
    another.

    Ctrl-C finishes the step, saves, and prints the command that goes on. What --out holds in the
    end: adapter/ in PEFT's format (adapter.safetensors of a classifier), best/ where held-out rows
    said so, log.jsonl, loss.png, and checkpoints/ for --resume.
    """
    if held_out and eval_split:
        raise typer.BadParameter("give --eval or --eval-split, not both")
    from lora_jax.cli import run_train
    from lora_jax.cli.train_options import Options
    from lora_jax.training.optimizer import Optimizer

    options = Options(
        model=model,
        data=tuple(data),
        held_out=tuple(held_out or ()),
        eval_split=eval_split,
        eval_rows=eval_rows,
        encoding=encoding,
        out=out,
        resume=resume,
        task=task.value,
        targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
        config={
            "rank": rank,
            "alpha": alpha,
            "init": init.value,
            "dora": dora,
            "scaling": "rslora" if rslora else "standard",
            "dropout": dropout,
        },
        optimizer=Optimizer(lr, schedule.value, warmup, clip, weight_decay, lora_plus),
        steps=steps,
        epochs=epochs,
        rows=batch,
        accumulate=accumulate,
        length=length,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        shuffle=shuffle,
        dtype=dtype.value if dtype else None,
        scan=scan,
    )
    run_train.main(options, _again(context))


def _again(context: typer.Context) -> str:
    """The command that goes on with this run: what was given, and --resume."""
    words = ["lora-jax", "train"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.name == "resume" or value == parameter.get_default(context) or value is None:
            continue
        flags = [*parameter.opts, *parameter.secondary_opts]
        if isinstance(value, bool):
            words.append(flags[0] if value else flags[-1])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [flags[0], _plain(one)]
    return shlex.join([*words, "--resume"])


def _plain(value: Any) -> str:
    return str(value.value if isinstance(value, enum.Enum) else value)
