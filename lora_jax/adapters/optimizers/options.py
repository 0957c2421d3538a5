"""Checks of options that may be numbers, or arrays of a sweep whose values are not known."""

from typing import Any

from lora_jax.core.checks import is_number
from lora_jax.core.errors import ConfigError


def check_number(
    caller: str, name: str, value: Any, *, above: float | None = None, below: float | None = None
) -> None:
    """Raise if a number is outside of (above, below), or of [0, below) without `above`.

    >>> check_number("lora_rite", "b1", 1.5, below=1)
    Traceback (most recent call last):
    lora_jax.core.errors.ConfigError: lora_rite: b1 must be at least 0 and below 1, got 1.5
    """
    if not is_number(value):
        return
    low = value >= 0 if above is None else value > above
    if low and (value < (float("inf") if below is None else below)):
        return
    least = "at least 0" if above is None else f"above {above:g}"
    most = "finite" if below is None else f"below {below:g}"
    raise ConfigError(f"{caller}: {name} must be {least} and {most}, got {value!r}")
