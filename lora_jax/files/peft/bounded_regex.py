"""Match the regular expressions of an untrusted configuration in bounded time.

Python's `re` may take forever on `(a+)+$`. The library `regex` supports the same language, and has
a timeout.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import regex

from lora_jax.core.errors import ConfigError

SECONDS = 2.0  # per name; a harmless expression takes microseconds


def problem(pattern: str, within: str = "{}") -> str | None:
    """Return why this is not a regular expression, or None.

    Args:
      pattern: the expression.
      within: the one that PEFT builds of it.

    >>> problem("layers.(0|1"), problem(r"layers\\.\\d+")
    ('missing ), unterminated subpattern at position 7', None)
    >>> problem("(?x) q  # the query") is None, problem("(?x) q  # the query", "({})$") is None
    (True, False)
    """
    whole = within.replace("{}", pattern)
    try:
        with warnings.catch_warnings():  # of what future versions would read differently
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)  # which PEFT uses
            regex.compile(pattern)
            regex.compile(whole)
    except regex.error as error:
        return f"{error}, within PEFT's {whole!r}" if error.pattern != pattern else str(error)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def match(pattern: str, text: str) -> regex.Match[str] | None:
    """Match the beginning of a name, as `re.match` does.

    Raises:
      ConfigError: it takes longer than `SECONDS`.
    """
    return _bounded(regex.match, pattern, text)


def fullmatch(pattern: str, text: str) -> bool:
    """Return whether a pattern matches a whole name, as `re.fullmatch`; may raise as `match`."""
    return _bounded(regex.fullmatch, pattern, text) is not None


def _bounded(matcher: Callable[..., Any], pattern: str, text: str) -> regex.Match[str] | None:
    try:
        return matcher(pattern, text, timeout=SECONDS)
    except TimeoutError:
        shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
        raise ConfigError(
            f"the regular expression {shown!r} takes too long to match {text[:80]!r}; "
            "rewrite it without nested repeats"
        ) from None
