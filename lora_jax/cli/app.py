"""The `lora-jax` application: its commands, and the help that they share.

A command's module contains its signature and EXAMPLES, and imports its job only when it runs, so
`--help` loads neither Flax nor a tokenizer.
"""

from types import ModuleType
from typing import Annotated

import typer

from lora_jax import __version__
from lora_jax.cli.commands import (
    chat,
    combine,
    convert,
    evaluate,
    generate,
    inspect,
    merge,
    predict,
    quantize,
    serve,
    sweep,
    train,
)
from lora_jax.cli.parameters.config_file import configurable
from lora_jax.cli.parameters.groups import GroupedCommand

#: The commands in the help's order: name -> the module whose `command` it runs.
COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "sweep": sweep,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "predict": predict,
    "eval": evaluate,
    "inspect": inspect,
    "merge": merge,
    "quantize": quantize,
    "convert": convert,
    "combine": combine,
}

EXIT_CODES = """\b
Exit codes:
  0    success
  1    failure: one line on stderr says why, and what to do
  2    usage error
  130  interrupted (Ctrl-C)
  141  output pipe closed
Set LORA_JAX_DEBUG=1 to see the traceback of a failure."""


def examples(commands: tuple[str, ...]) -> str:
    """Return the part of a help that shows commands to copy, each on one line at any width."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


app = typer.Typer(
    name="lora-jax",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would wrap the examples, which must stay lines to copy
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="\n\n".join(
        [examples(tuple(module.EXAMPLES[0] for module in COMMANDS.values())), EXIT_CODES]
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-jax {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _lora_jax(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train, inspect, merge, run, serve, convert and combine LoRA adapters of JAX models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


#: Commands without options that are worth a file.
_BY_WORDS = (inspect, quantize)

for _name, _module in COMMANDS.items():
    _documented = app.command(_name, cls=GroupedCommand, epilog=examples(_module.EXAMPLES))
    _documented(_module.command if _module in _BY_WORDS else configurable(_module.command))
