"""Single JSON values of a data file: what they are, and what is wrong with them."""

from typing import Any


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    names |= {int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)  # a table has dates and bytes, too


def describe(name: str, value: Any) -> str | None:
    """Return what is wrong with any string inside a value, or None."""
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            return f"{name} contains half of a surrogate pair, which is not a character"
        return None
    inside: dict[Any, Any] = {}
    if isinstance(value, dict):
        inside = {f"{name}.{key}": x for key, x in value.items()}
        if problem := describe(f"a key of {name}", "".join(value)):
            return problem
    elif isinstance(value, list):
        inside = {f"{name}[{i}]": x for i, x in enumerate(value)}
    return next(filter(None, (describe(key, x) for key, x in inside.items())), None)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: tables have every key in every row."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value
