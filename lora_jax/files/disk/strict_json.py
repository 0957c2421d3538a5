"""Strict JSON, and error messages that stay short whatever a file contains."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import AdapterFileError, LoraError, grouped
from lora_jax.core.foreign import shown, shown_value

_MAX_LINES, _MOST = 200, 300  # lines of one message, characters of each


def parse_json(text: str | bytes, source: str, error: type[LoraError] = AdapterFileError) -> Any:
    """Parse a JSON value strictly: every JSON file is read here.

    Refused are repeated keys, NaN and infinity, numbers that no float can hold (1e999, or hundreds
    of digits), text that is not UTF-8 or has half a surrogate pair, and nesting without end.

    Args:
      text: the text; a byte order mark is skipped.
      source: the file's name, with which the message starts.
      error: the class of the error.

    Raises:
      AdapterFileError: it is not valid, or `error` in its place.

    >>> parse_json('{"r": 8}', "adapter_config.json")
    {'r': 8}
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        # rejects half a surrogate pair, and such a number in a list
        json.dumps(value, ensure_ascii=False, default=_refuse).encode("utf-8")
    except RecursionError:
        raise error(f"{source}: the JSON is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{source}: not valid JSON: {shown(problem)}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown_value(twice)} appears twice")
    for key, x in pairs:
        if isinstance(x, _Beyond):
            raise ValueError(f"{shown_value(key)}: {x.problem}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


class _Beyond:
    """A number that no float can hold."""

    def __init__(self, digits: str) -> None:
        self.problem = f"the number {shown(digits, 40)} is beyond what a float can hold"


def _integer(digits: str) -> Any:
    return int(digits) if math.isfinite(float(digits)) else _Beyond(digits)


def _float(digits: str) -> Any:
    number = float(digits)
    return number if math.isfinite(number) else _Beyond(digits)


def _refuse(x: Any) -> Any:
    raise ValueError(x.problem)


def lines(problems: Sequence[str], noun: str = "tensors") -> str:
    """Join problems into lines for a terminal: one for each kind, without control characters."""
    found = grouped((shown(problem, _MOST) for problem in problems), noun).splitlines()
    more = len(found) - _MAX_LINES
    return "\n".join([*found[:_MAX_LINES], *([f"and {more} more"] if more > 0 else [])])


show = shown_value  # of values in these messages
