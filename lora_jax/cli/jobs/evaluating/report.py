"""The figures of `lora-jax eval` in print: lines, a table, or JSON."""

import json
from collections.abc import Sequence
from typing import Any

from lora_jax.core.foreign import shown

_SHARES = ("accuracy", "normalized_accuracy", "exact_match")


def show(names: Sequence[str], found: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the figures of each adapter: those of a single one as lines, of several as a table."""
    if as_json:
        several = [{"adapter": name, **one} for name, one in zip(names, found, strict=True)]
        print(json.dumps(found[0] if len(found) == 1 else several, ensure_ascii=False))
        return
    lines = _lines(found[0]) if len(found) == 1 else _table(names, found)
    for line in lines:
        print(line)


def _lines(found: dict[str, Any]) -> list[str]:
    width = max(12, *(len(name) for name, x in found.items() if not isinstance(x, dict)))
    return [
        line
        for name, value in found.items()
        for line in (
            [f"{name} {shown(key):<16} {one}" for key, one in value.items()]
            if isinstance(value, dict)
            else [f"{name:<{width}} {_number(name, value)}"]
        )
    ]


def _table(names: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a header and a line for each adapter; what has several values is left out."""
    columns = [name for name, value in found[0].items() if not isinstance(value, dict)]
    cells = [["adapter", *columns]]
    for name, one in zip(names, found, strict=True):
        cells.append([shown(name), *(_number(column, one[column]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in cells
    ]


def _number(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name in _SHARES else f"{value:.4f}"
