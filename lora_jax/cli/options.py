"""Options that several commands have."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from lora_jax.cli.errors import OutputError

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


Options = TypeVar("Options")


def takes(
    options: type[Options],
) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Makes a command of a function of one value, whose fields are the command's options.

    Args:
      options: a dataclass, its fields annotated for typer.
    """

    def decorate(function: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        def command(context: typer.Context, **given: Any) -> None:
            function(context, options(**given))

        first, _ = inspect.signature(command).parameters.values()
        fields = inspect.signature(options).parameters.values()
        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature([first, *fields])  # type: ignore[attr-defined]
        return command

    return decorate


def refuse_existing(out: Path, force: bool) -> None:
    """Raise where something is at `out` that would be written over.

    An empty directory is no such thing. Checked before the work, which may take long.
    """
    is_there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_there and not force:
        raise OutputError(f"{out}: exists already; choose another --out, or --force to write there")
