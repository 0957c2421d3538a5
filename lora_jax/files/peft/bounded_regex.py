"""Regular expressions of a configuration, which comes from strangers, matched in bounded time.

On `(a+)+$` Python's `re` may take for ever. The library `regex` reads the same language and stops
when it is told to.
"""

import re

import regex

from lora_jax.core.errors import ConfigError

SECONDS = 2.0  # for one name; an expression that is none of an attack takes microseconds


def problem(pattern: str) -> str | None:
    """Why this is not a regular expression, or None.

    >>> problem("layers.(0|1"), problem(r"layers\\.\\d+")
    ('missing ), unterminated subpattern at position 7', None)
    """
    try:
        re.compile(pattern)  # what PEFT takes
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def match(pattern: str, text: str) -> regex.Match[str] | None:
    """The match at the beginning of a name, as `re.match`.

    Raises:
      ConfigError: it takes longer than `SECONDS`.
    """
    try:
        return regex.match(pattern, text, timeout=SECONDS)
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
        raise ConfigError(
            f"the regular expression {shown!r} takes too long to match {text[:80]!r}; write it "
            "without repeats inside of repeats"
        ) from None


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a pattern matches a whole name, as `re.fullmatch`; raises what `match` does."""
    return match(rf"(?:{pattern})\Z", text) is not None
