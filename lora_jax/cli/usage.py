"""Mistakes on the command line, in its own words."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from lora_jax.cli.foreign_options import advice
from lora_jax.core.foreign import shown

#: What the library that checks values says, and what a person would.
_WORDS = (
    (r"Value error, ", ""),
    (r"Input should be ", "must be "),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r"greater than", "above"),
    (r"less than", "below"),
    (r"a valid integer(, .*)?", "an integer"),
    (r"a valid number(, .*)?", "a number"),
    (r"a valid boolean(, .*)?", "true or false"),
    (r"a valid (\w+)(, .*)?", r"a \1"),
    (r"^('[^']*' is not one of )", r"\1"),
)
_INVALID = re.compile(r"Invalid value for '?(?P<option>-[\w-]+)[^:]*: (?P<what>.*)", re.DOTALL)


def describe(error: Any, words: Sequence[str]) -> str:
    """Return what is wrong on the command line.

    Args:
      error: typer's, with `format_message`.
      words: the command line.
    """
    message: str = error.format_message()
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        return _unknown(error.option_name, context)
    invalid = _INVALID.fullmatch(message)
    if invalid is None:
        return message.removeprefix("Invalid value: ")
    if invalid["option"] == "--config":  # a message about the file
        return invalid["what"]
    what = describe_value(invalid["what"], _given(words, invalid["option"]))
    return f"Invalid value for '{invalid['option']}': {what}"


def describe_value(message: str, value: str | None) -> str:
    """Return what is wrong with a value, without the words of the library that checks it.

    >>> describe_value("Input should be greater than or equal to 1.", "0")
    'must be at least 1, got 0'
    """
    what = message.rstrip(".")
    for pattern, better in _WORDS:
        what = re.sub(pattern, better, what)
    got = "" if value is None or f"{value!r} is not one of" in what else f", got {shown(value)}"
    return what + got


def _unknown(name: str, context: Any) -> str:
    """Return a message for an option that does not exist, with the one that was meant."""
    parameters = context.command.params if context is not None else []
    options = [option for parameter in parameters for option in parameter.opts]
    known = advice(name, options)
    if known is not None:
        return f"No such option: {name}; {known}"
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.7)
    return f"No such option: {name}" + (f"; perhaps {' or '.join(close)}" if close else "")


def _given(words: Sequence[str], option: str) -> str | None:
    """Return the last value of an option on the command line."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
