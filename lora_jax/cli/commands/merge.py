"""`lora-jax merge`: a base and an adapter as one model."""

from pathlib import Path
from typing import Annotated

import typer

from lora_jax.cli.options import DType, Force, Model, Out

EXAMPLES = (
    "lora-jax merge --model my-model --adapter my-adapter --out merged",
    "lora-jax merge -m my-model --adapter my-adapter --dtype bfloat16 --out merged-16",
)


def command(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="An adapter of any kind that 'inspect' reads.")],
    out: Out,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of the result; by default the base's own, float32 for a GGUF file."),
    ] = None,
    force: Force = False,
) -> None:
    """Merge an adapter into its base: a model in Hugging Face's layout that needs no adapter.

    Weights are added in float32 and rounded once; how much of the update the rounding lost is
    told. The tokenizer, and whatever else stands beside the base's weights, comes along. The
    directory appears whole or not at all, and the base is never changed.
    """
    from lora_jax.cli.jobs import merge

    merge.run(model, adapter, out, dtype=dtype, force=force)
