"""Match the regular expressions of an untrusted configuration in bounded time.

Python's `re` may take forever on `(a+)+$`. The library `regex` supports the same language, and has
a timeout.
"""

import re

import regex

from lora_jax.core.errors import ConfigError

SECONDS = 2.0  # per name; a harmless expression takes microseconds


def problem(pattern: str) -> str | None:
    """Return why this is not a regular expression, or None.

    >>> problem("layers.(0|1"), problem(r"layers\\.\\d+")
    ('missing ), unterminated subpattern at position 7', None)
    """
    try:
        re.compile(pattern)  # which PEFT uses
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def match(pattern: str, text: str) -> regex.Match[str] | None:
    """Match the beginning of a name, as `re.match` does.

    Raises:
      ConfigError: it takes longer than `SECONDS`.
    """
    try:
        return regex.match(pattern, text, timeout=SECONDS)
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
        raise ConfigError(
            f"the regular expression {shown!r} takes too long to match {text[:80]!r}; "
            "rewrite it without nested repeats"
        ) from None


def fullmatch(pattern: str, text: str) -> bool:
    """Return whether a pattern matches a whole name, as `re.fullmatch`; may raise as `match`."""
    return match(rf"(?:{pattern})\Z", text) is not None
