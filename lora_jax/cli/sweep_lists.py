"""The lists of `lora-jax sweep`, and the runs of their grid."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import typer

from lora_jax.cli.sweep_options import LISTS, SweepOptions

Settings = dict[str, Any]  # the options of `lora-jax train` that one run has

#: Options of `train` -> the type of a value, whether it is valid, and what a valid one is.
_VALUES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "rank": (int, lambda x: x >= 1, "at least 1"),
    "alpha": (float, lambda x: 0 < x < math.inf, "above 0 and finite"),
    "lr": (float, lambda x: 0 < x < math.inf, "above 0 and finite"),
    "weight_decay": (float, lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    "dropout": (float, lambda x: 0 <= x <= 0.99, "from 0 to 0.99"),
    "seed": (int, lambda x: 0 <= x < 2**31, "from 0 to 2147483647"),
}


def read_grid(options: SweepOptions) -> list[Settings]:
    """Return the settings of every run: all combinations of the lists, the first varies slowest.

    Raises:
      BadParameter: a list is empty, contains something without meaning, or contains it twice.
    """
    axes = {
        name: _read(f"--{several.replace('_', '-')}", getattr(options, several), *_VALUES[name])
        for name, several in LISTS.items()
    }
    given = {name: values or [None] for name, values in axes.items()}
    return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


def _read(
    option: str, text: str, kind: type, is_valid: Callable[[Any], bool], what: str
) -> list[Any]:
    """Return the values of a list; none of an empty text."""
    if not text and option == "--alphas":
        return []
    values: list[Any] = []
    for word in text.split(","):
        try:
            value = kind(word)
        except ValueError:
            number = "an integer" if kind is int else "a number"
            raise typer.BadParameter(
                f"{word.strip()!r} is not {number}; write them as 1,2,3", param_hint=option
            ) from None
        if not is_valid(value):
            raise typer.BadParameter(f"each must be {what}, got {word.strip()}", param_hint=option)
        if value in values:
            raise typer.BadParameter(f"{word.strip()} is there twice", param_hint=option)
        values.append(value)
    return values
