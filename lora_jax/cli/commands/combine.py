"""`lora-jax combine`: several adapters as one, or one with another rank."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_jax.cli.commands.convert import Format
from lora_jax.cli.options import (
    ForceOption,
    FullRankOption,
    NamingOption,
    OutOption,
    RenameOption,
    ResidualOption,
    StrictOption,
)

EXAMPLES = (
    "lora-jax combine my-adapter my-mlx-adapter --weights 0.7,0.3 --out both",
    "lora-jax combine my-adapter my-mlx-adapter --weights 1,-1 --out difference",
    "lora-jax combine my-adapter my-mlx-adapter --method ties --density 0.2 --out voted",
    "lora-jax combine my-adapter --rank 2 --out smaller",
    "lora-jax combine my-adapter --energy 0.99 --to folded --out small-for-vllm",
)


def command(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Adapters of any kind that 'inspect' reads."),
    ],
    out: OutOption,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", "-w", metavar="W,W,...", help="One number per adapter; default: 1 each."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method, see above; default: cat, or svd where --rank is given."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of elements that ties, dare and magnitude_prune keep."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result of methods that end in svd.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Then compress: the share of each squared update to keep, such as 0.99."),
    ] = None,
    majority_sign: Annotated[
        Literal["total", "frequency"], typer.Option(help="How ties elects a sign.")
    ] = "total",
    exact: Annotated[
        bool,
        typer.Option(help="Exact SVD of dense sums, or a randomized one, which is much faster."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Random seed of dare.")] = 0,
    to: Annotated[
        Format | None,
        typer.Option(help="Output format, as for 'convert'; default: that of the first adapter."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model, where names, shapes or values are needed."),
    ] = None,
    naming: NamingOption = None,
    rename: RenameOption = None,
    residual: ResidualOption = False,
    full_rank: FullRankOption = None,
    strict: StrictOption = True,
    force: ForceOption = False,
) -> None:
    # \b keeps the help from filling up the lines of the list
    """Combine adapters of one base into one adapter, or compress a single one.

    \b
    cat              the weighted sum, exactly; ranks add up
    svd              its best approximation of --rank
    linear           A's are added to A's, B's to B's
    ties             the largest elements, signs elected
    dare_linear      random elements, divided by density
    dare_ties        random elements, signs elected
    magnitude_prune  the largest elements
    ..._svd          the last four on A·B, with --rank

    The methods and their numbers are those of PEFT's add_weighted_adapter. A negative weight
    subtracts. Alpha and rsLoRA count, and the result has scale 1. No base is needed for adapters
    with PyTorch's names, or for files of lora_jax that become one; --model is for a mixture of the
    two, for DoRA, and for fully trained modules, whose changes depend on the base.
    """
    from lora_jax.cli.fit import Fit
    from lora_jax.cli.jobs.adapter_files import combine

    sources = combine.Sources(
        adapters, model, naming, Fit.of_options(strict, rename, residual, full_rank)
    )
    how = combine.How(weights, method, density, rank, energy, majority_sign, exact, seed)
    combine.run(sources, how, to, out, force=force)
