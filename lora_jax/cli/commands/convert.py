"""`lora-jax convert`: an adapter from one kind of file to another."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_jax.cli.options import Force, Out

Target = Literal["peft", "native", "mlx", "folded"]

EXAMPLES = (
    "lora-jax convert my-adapter --to folded --out my-folded-adapter",
    "lora-jax convert my-mlx-adapter --to peft --out my-peft-adapter",
    "lora-jax convert my-adapter --to native --model my-model --out my-adapter.safetensors",
    "lora-jax convert adapter.safetensors --to peft --naming naming.json --out exported",
)


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter of any kind that 'inspect' reads.")],
    to: Annotated[Target, typer.Option(help="What to write, see above.")],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base, for its names and shapes."),
    ] = None,
    naming: Annotated[
        Path | None,
        typer.Option(
            help="Names and axes of a model of your own: JSON, see lora_jax.files.naming."
        ),
    ] = None,
    force: Force = False,
) -> None:
    # \b keeps the help from filling up the lines of the list
    """Convert an adapter; the function that it makes stays the same.

    \b
    peft    a directory of Hugging Face PEFT
    folded  the same for readers that know no
            patterns (vLLM, llama.cpp): the scale
            in B, one rank for all modules
    mlx     a directory of mlx-lm
    native  a file of lora_jax

    PEFT and mlx-lm have the same names, so nothing else is needed between the two. A file of
    lora_jax has the paths and axes of a JAX model: to or from it, say which with --model, or from
    it with --naming.
    """
    from lora_jax.cli.jobs import convert

    convert.run(adapter, to, out, model=model, naming=naming, force=force)
