"""Strict JSON, and error messages that stay short whatever a file contains."""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import AdapterFileError, grouped
from lora_jax.core.foreign import shown

_REPR = reprlib.Repr()  # shortens values of any depth and size
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 120
_MAX_LINES, _MOST = 200, 300  # lines of one message, characters of each


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a JSON value strictly: unique keys, no NaN or infinity, UTF-8, not too deep.

    Raises:
      AdapterFileError: it is not valid; the message starts with `source`.

    >>> parse_json('{"r": 8}', "adapter_config.json")
    {'r': 8}
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # rejects half a surrogate pair
    except RecursionError:
        raise AdapterFileError(f"{source}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise AdapterFileError(f"{source}: not valid JSON: {shown(error)}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(twice)} appears twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def lines(problems: Sequence[str], noun: str = "tensors") -> str:
    """Join problems into lines for a terminal: one for each kind, without control characters."""
    found = grouped((shown(problem, _MOST) for problem in problems), noun).splitlines()
    more = len(found) - _MAX_LINES
    return "\n".join([*found[:_MAX_LINES], *([f"and {more} more"] if more > 0 else [])])


def show(value: Any) -> str:
    """Return the `repr` of a value of any depth and size, shortened."""
    return shown(_REPR.repr(value))
