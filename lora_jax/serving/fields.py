"""Read the fields of a request's JSON object, each of them checked."""

import json
from collections.abc import Collection
from typing import Any

from lora_jax.core.checks import is_integer, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.serving.errors import RequestError

LARGEST = 2**63 - 1  # integer that a field takes where nothing else bounds it


def wrong(name: str, wanted: str, value: Any) -> RequestError:
    """Return the error for a field with a wrong value."""
    return RequestError(f"{name} must be {wanted}, got {shown_value(value)}", param=name)


class Fields:
    """The fields of a JSON object, in which null is the same as a missing field.

    Args:
      body: the bytes of the request.

    Raises:
      RequestError: they are not a JSON object.
    """

    def __init__(self, body: bytes) -> None:
        try:
            given = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"the body is not valid JSON: {error or type(error).__name__}"
            ) from None
        if not isinstance(given, dict):
            raise RequestError(f"the body must be a JSON object, got {shown_value(given)}")
        self._given = {key: value for key, value in given.items() if value is not None}

    def refuse_others(self, known: Collection[str], inert: Collection[str]) -> None:
        """Raise if there are fields that would be ignored; `inert` ones may be."""
        for name in sorted(self._given.keys() - {*known, *inert}):
            raise RequestError(
                f"unknown or unsupported field {shown_value(name)}; this server takes "
                f"{', '.join(known)}",
                param=name,
                code="unsupported_parameter",
            )

    def refuse_values(self, allowed: dict[str, tuple[Any, ...]]) -> None:
        """Raise if a field has another value than those that change nothing."""
        for name, values in allowed.items():
            value = self._given.get(name, values[0])
            if not any(type(value) is type(x) and value == x for x in values):
                raise RequestError(
                    f"{name} is not supported; leave it out or give {json.dumps(values[0])}",
                    param=name,
                    code="unsupported_parameter",
                )

    def value(self, name: str) -> Any:
        """Return a field as it is, None if it is missing."""
        return self._given.get(name)

    def text(self, name: str) -> str:
        """Return a string that must be there and not be empty."""
        value = self._given.get(name)
        if not isinstance(value, str) or not value:
            raise wrong(name, "a string that is not empty", value)
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean, false if it is missing."""
        value = self._given.get(name, False)
        if not isinstance(value, bool):
            raise wrong(name, "true or false", value)
        return value

    def integer(self, name: str, lowest: int, highest: int, default: int | None) -> int | None:
        """Return an integer within its bounds."""
        value = self._given.get(name, default)
        if value is None or (is_integer(value) and lowest <= value <= highest):
            return value
        if highest == LARGEST:
            raise wrong(name, f"an integer of {lowest} or more", value)
        raise wrong(name, f"an integer from {lowest} to {highest}", value)

    def number(self, name: str, lowest: float, highest: float, default: float) -> float:
        """Return a number within its bounds."""
        value = self._given.get(name, default)
        if not is_within(value, lowest, highest):
            raise wrong(name, f"a number from {lowest:g} to {highest:g}", value)
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return a string or a list of strings, none of them empty, as a tuple."""
        value = self._given.get(name, [])
        found = [value] if isinstance(value, str) else value
        if (
            not isinstance(found, list)
            or len(found) > most
            or not all(isinstance(x, str) and x for x in found)
        ):
            raise wrong(name, f"a string or a list of up to {most}, none of them empty", value)
        return tuple(found)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
