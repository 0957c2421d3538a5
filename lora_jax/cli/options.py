"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_jax import LoraError


class OutputError(LoraError):
    """A result cannot go where it was told to."""


DType = Literal["float32", "bfloat16", "float16"]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="The base: a Hugging Face directory, a GGUF file, or smollm2 (fetched).",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Write into a place that exists already.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]


def refuse_existing(out: Path, force: bool) -> None:
    """Raise where something is at `out` that would be written over.

    An empty directory is no such thing. Checked before the work, which may take long.
    """
    is_there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_there and not force:
        raise OutputError(f"{out}: exists already; choose another --out, or --force to write there")
