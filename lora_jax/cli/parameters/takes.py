"""Commands that take all of their options as one value."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import typer

OptionsClass = TypeVar("OptionsClass")


def takes(
    options: type[OptionsClass],
    instead: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> Callable[[Callable[[typer.Context, OptionsClass], None]], Callable[..., None]]:
    """Make a command of a function that takes one value, whose fields are the command's options.

    Args:
      options: a dataclass whose fields are annotated for typer.
      instead: names of fields that the help shows in the place of others, which are left out:
        `{"rank": "ranks"}`.
      without: names of fields that are not options, and keep their defaults.
    """
    instead = dict(instead or {})

    def decorate(function: Callable[[typer.Context, OptionsClass], None]) -> Callable[..., None]:
        def command(context: typer.Context, **given: Any) -> None:
            function(context, options(**given))

        first = next(iter(inspect.signature(command).parameters.values()))
        fields = inspect.signature(options).parameters
        moved = {*instead.values(), *without}
        shown = [fields[instead.get(name, name)] for name in fields if name not in moved]
        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature([first, *shown])  # type: ignore[attr-defined]
        return command

    return decorate
