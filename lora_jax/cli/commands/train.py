"""`lora-jax train`: fine-tune a model on a file."""

import shlex

import typer

from lora_jax.cli.options import takes
from lora_jax.cli.train_options import TrainOptions

EXAMPLES = (
    "lora-jax train --model smollm2 --data play.txt --targets q_proj,v_proj --out run",
    "lora-jax train --model Llama-3.2-1B --data chats.jsonl --eval-split 0.1 --epochs 3 --out run",
    "lora-jax train --model MiniLM --task classification --data reviews.jsonl --out run",
    "lora-jax train --model tiny --data notes.txt --steps 20 --out run --resume",
)


@takes(TrainOptions)
def command(context: typer.Context, options: TrainOptions) -> None:
    """Fine-tune a model on a file with LoRA.

    A .txt file is one text. All rows of a .jsonl, .json, .csv, .tsv or .parquet file are of one
    kind: {"text"}, {"prompt", "completion"}, {"messages": [{"role", "content"}, ...]}, or, for
    classification, {"text", "label"}; ShareGPT's and Alpaca's keys are messages. The loss ignores
    prompts and users' turns. Short texts share a row without attending to one another.

    Ctrl-C finishes the step, saves, and prints the command that resumes the run. At the end, --out
    contains adapter/ in PEFT's format (adapter.safetensors for a classifier), best/ for the lowest
    evaluation loss, log.jsonl, loss.png, and checkpoints/ for --resume.
    """
    if options.held_out and options.eval_split:
        raise typer.BadParameter("give either --eval or --eval-split, not both")
    from lora_jax.cli.jobs import train

    train.main(options, _resume_command(context))


def _resume_command(context: typer.Context) -> str:
    """Return the command that resumes this run: the given options, and --resume."""
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
