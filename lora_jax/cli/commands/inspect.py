"""`lora-jax inspect`: what an adapter file contains."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "lora-jax inspect my-adapter",
    "lora-jax inspect adapter.safetensors --all",
    "lora-jax inspect my-adapter --json > adapter.json",
)


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of PEFT, mlx-lm or a run, file of lora_jax, or model.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="One line per module instead of one per kind of module.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Output as JSON, for programs.")] = False,
) -> None:
    """Show what an adapter contains: ranks, targets, norms, spectrum of the updates, base model.

    The base model is not needed: everything is computed from A and B. The adapter adds
    ΔW = scale·A·B to the base weight. The columns are the rank of A and B, the scale, the Frobenius
    norms |A|, |B| and |ΔW|, the stable rank of ΔW (its squared norm divided by its largest squared
    singular value), and the number of singular directions that contain 90 % and 99 % of its squared
    norm.

    For a model the table says how its tensors are stored, quantized or not, and their bytes.
    """
    from lora_jax.cli.jobs import inspect

    inspect.run(adapter, every=every, as_json=as_json)
