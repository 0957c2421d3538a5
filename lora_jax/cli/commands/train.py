"""`lora-jax train`: fine-tune a model on a file."""

from __future__ import annotations

import shlex

import typer

from lora_jax.cli.options import takes
from lora_jax.cli.train_options import Options

EXAMPLES = (
    "lora-jax train --model smollm2 --data play.txt --targets q_proj,v_proj --out run",
    "lora-jax train --model Llama-3.2-1B --data chats.jsonl --eval-split 0.1 --epochs 3 --out run",
    "lora-jax train --model MiniLM --task classification --data reviews.jsonl --out run",
    "lora-jax train --model tiny --data notes.txt --steps 20 --out run --resume",
)


@takes(Options)
def command(context: typer.Context, options: Options) -> None:
    """Fine-tune a model on a file with LoRA.

    A .txt file is one text. The rows of a .jsonl file are of one kind: {"text"}, {"prompt",
    "completion"}, {"messages": [{"role", "content"}, ...]}, or, to classify, {"text", "label"}.
    Prompts and users' turns are read, not learned; short texts share rows and do not see one
    another.

    Ctrl-C finishes the step, saves, and prints the command that goes on. What --out holds in the
    end: adapter/ in PEFT's format (adapter.safetensors of a classifier), best/ where held-out rows
    said so, log.jsonl, loss.png, and checkpoints/ for --resume.
    """
    if options.held_out and options.eval_split:
        raise typer.BadParameter("give --eval or --eval-split, not both")
    from lora_jax.cli.jobs import train

    train.main(options, _again(context))


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
            words += [flags[0], str(one)]
    return shlex.join([*words, "--resume"])
