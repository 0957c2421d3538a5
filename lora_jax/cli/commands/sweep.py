"""`lora-jax sweep`: fine-tune a model in many ways at once, and compare them."""

import typer

from lora_jax.cli.commands.train import check, resume_command
from lora_jax.cli.parameters.takes import takes
from lora_jax.cli.sweep_lists import read_grid
from lora_jax.cli.sweep_options import LISTS, WITHOUT, SweepOptions
from lora_jax.cli.train_options import CLASSIFICATION, SEES_RANK

EXAMPLES = (
    "lora-jax sweep --model tiny --data notes.txt --ranks 2,4 --lrs 1e-3,1e-2 --steps 9 --out run",
    "lora-jax sweep --model smollm2 --data play.txt --ranks 2,4,8 --lrs 1e-4,3e-4,1e-3 --out run",
    "lora-jax sweep --model ./llama-1b --data chats.jsonl --eval-split 0.1 --slots 4 --lrs "
    "1e-4,2e-4,5e-4,1e-3,2e-3,5e-3 --halving --out run",
)

#: Initializations that change the base, which the runs share.
_CHANGES_BASE = ("pissa", "pissa_fast", "olora")


@takes(SweepOptions, instead=LISTS, without=WITHOUT)
def command(context: typer.Context, options: SweepOptions) -> None:
    """Fine-tune a model with LoRA in many ways at once, and compare them.

    Each combination of --ranks, --lrs, --alphas, --weight-decays, --dropouts and --seeds is a run
    of 'lora-jax train', with the losses that it would have alone. --slots of them train at once, in
    one compiled step with one base model; the others follow in their places. The data is as for
    'train'.

    Ctrl-C finishes the steps under way, saves, and prints the command that resumes. At the end,
    --out contains a directory for each run with its adapter/, such as rank16-lr3e-4/adapter;
    results.json, log.jsonl, losses.png, map.png for several ranks and rates, and checkpoints/ for
    --resume.
    """
    check(context, options)
    if options.init in _CHANGES_BASE:
        raise typer.BadParameter(
            f"{options.init} changes the base, which all runs share; train such runs one by one",
            param_hint="--init",
        )
    grid = read_grid(options)
    if options.halving and len(grid) < options.eta:
        raise typer.BadParameter(
            f"--halving keeps one of {options.eta} runs (--eta), but there are {len(grid)}; add "
            "values to the lists"
        )
    if options.optimizer in SEES_RANK and len({one["rank"] for one in grid}) > 1:
        raise typer.BadParameter(
            f"a step of {options.optimizer} depends on the largest rank; give one rank",
            param_hint="--ranks",
        )
    if options.task == CLASSIFICATION and len({one["seed"] for one in grid}) > 1:
        raise typer.BadParameter(
            "a classifier's new head is part of the base, which all runs share; give one seed",
            param_hint="--seeds",
        )
    if options.stream and len({one["seed"] for one in grid}) > 1:
        raise typer.BadParameter(
            "the order of streamed rows depends on the seed; give one seed, or --no-stream",
            param_hint="--seeds",
        )
    from lora_jax.cli import compile_cache
    from lora_jax.cli.jobs.sweeping import sweep

    with compile_cache.compile_cache(options.compile_cache):
        sweep.main(options, grid, resume_command(context))
