"""Training data: rows of five kinds, in JSON or a table, or one plain text."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.rows.arrow import read_arrow
from lora_jax.training.rows.compressed import read_bytes, suffixes
from lora_jax.training.rows.fields import UNCHANGED, Fields
from lora_jax.training.rows.forms import FORMS, KEYS, KNOWN, read_row
from lora_jax.training.rows.json_values import describe
from lora_jax.training.rows.tables import read_csv, read_parquet

__all__ = [
    "FORMS",
    "KEYS",
    "KNOWN",
    "STREAM",
    "Row",
    "Rows",
    "decode_file",
    "parse_row",
    "read_rows",
]

STREAM = "stream"  # a .txt file: one text, not divided into rows
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_TEXTS = (*_LINES, *_TABLES, ".json", ".txt")
_BINARY = {".parquet": read_parquet, ".arrow": read_arrow}


@dataclass(frozen=True)
class Row:
    """One row of a file, checked."""

    line: int  # number of the line or row, counted from 1
    values: Mapping[str, Any]  # by key; every string can be encoded


@dataclass(frozen=True)
class Rows:
    """The rows of a file, all of one kind."""

    source: str  # the file's name, for messages
    kind: str  # a key of KEYS, or STREAM, which has a single row with "text"
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()  # other keys found in some rows
    unit: str = "line"  # what `Row.line` counts

    @property
    def places(self) -> list[str]:
        """What to call each row in messages."""
        return [f"{self.unit} {row.line}" for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(
    path: str | Path,
    encoding: str = "utf-8",
    fields: Fields = UNCHANGED,
    prefer: str | None = None,
) -> Rows:
    """Read a file of rows, or a `.txt` file, a single text.

    `.jsonl` has one JSON object per line, `.json` a list of them, `.csv` and `.tsv` a header and
    columns, `.parquet` and `.arrow` columns; files of text may be compressed and end in `.gz` or
    `.zst`. A row has the keys of a kind in `KEYS`, those of ShareGPT
    (`conversations` of `from` and `value`) or those of Alpaca (`instruction`, `input`, `output`);
    both of these are of the kind "chat". A conversation may have `tools`.

    Args:
      path: the file. Blank lines of a `.jsonl` file and a byte order mark are skipped.
      encoding: text encoding of the file, a name that Python knows.
      fields: columns that stand for the keys of rows.
      prefer: the kind of rows whose keys are those of several.

    Raises:
      DataError: the file is missing or empty, has another suffix or another encoding (the message
        names the byte), or has bad rows or rows of several kinds (the first ten are listed by
        line number).
    """
    path = Path(path)
    kind, compression = suffixes(path)
    if kind in _BINARY and not compression:
        return collect(str(path), "row", _numbered(_BINARY[kind](path)), fields, prefer)
    if kind not in _TEXTS:
        _refuse_type(path)
    text = decode_file(path, encoding)
    if kind == ".txt":
        problem = "text is empty" if not text.strip() else describe("text", text)
        if problem:
            raise DataError(f"{path}: {problem}; use a file that contains text")
        return Rows(str(path), STREAM, (Row(1, {"text": text}),))
    if kind in _TABLES:
        found = read_csv(str(path), text, KNOWN | fields.names, label=fields.column("label"))
        return collect(str(path), "row", _numbered(found), fields, prefer)
    if kind == ".json" and text.lstrip().startswith("["):
        return collect(str(path), "row", _numbered(_parse_list(str(path), text)), fields, prefer)
    # `splitlines` would also cut at characters that JSON strings may contain.
    lines = enumerate(text.split("\n"), start=1)
    return collect(
        str(path), "line", ((n, line) for n, line in lines if line.strip()), fields, prefer
    )


def _refuse_type(path: Path) -> NoReturn:
    if not path.exists():
        raise DataError(f"cannot read {path}: No such file or directory")
    raise DataError(
        f"{path}: unknown file type; rename it to .jsonl, .json, .csv, .tsv, .parquet or .arrow "
        f"(rows of {FORMS}) or .txt (one text); texts may be compressed: .gz or .zst"
    )


def decode_file(path: Path, encoding: str) -> str:
    """Return a file's text; raise `DataError` as `read_rows` does."""
    return decode(path, read_bytes(path), encoding)


def decode(path: Path, data: bytes, encoding: str, offset: int = 0, line: int = 1) -> str:
    """Return the text of a part of a file; raise `DataError` as `read_rows` does.

    Args:
      path: the file, for messages.
      data: the part.
      encoding: a name that Python knows.
      offset: where the part begins in the file.
      line: the number of its first line.
    """
    try:
        text = data.decode(encoding)
    except LookupError:
        raise DataError(f"{path}: unknown encoding {encoding!r}; try utf-8") from None
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        other = "latin-1" if encoding.lower().replace("_", "-") != "latin-1" else "utf-8"
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start} is not valid {encoding}; convert the file, or name its "
            f"encoding (perhaps --encoding {other})"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    return enumerate(rows, start=1)


def _parse_list(source: str, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{source}: the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})"
        ) from None
    except ValueError as error:  # a number of too many digits
        raise DataError(f"{source}: not valid JSON ({error})") from None


def collect(
    source: str,
    unit: str,
    found: Iterable[tuple[int, Any]],
    fields: Fields = UNCHANGED,
    prefer: str | None = None,
) -> Rows:
    """Return rows, given as numbered values, or, where the unit is "line", as lines of JSON.

    Raises:
      DataError: as `read_rows`.
    """
    problems: list[str] = []
    rows: list[tuple[str, Row]] = []
    ignored: dict[str, None] = {}
    for number, value in found:
        try:
            row = _parse(value) if unit == "line" else value
            kind, values, others = read_row(fields.rename(row), prefer)
        except ValueError as error:
            problems.append(f"{unit} {number}: {error}")
            continue
        rows.append((kind, Row(number, values)))
        ignored |= dict.fromkeys(others)
    if not rows and not problems:
        raise DataError(f"{source}: the file is empty; it should contain rows of {FORMS}")
    first = rows[0][0] if rows else ""
    problems += [
        f"{unit} {row.line} is a {kind} row, but {unit} {rows[0][1].line} is a {first} row"
        for kind, row in rows
        if kind != first
    ]
    if not problems and first == "label":
        problems = _label_problems([row for _, row in rows], unit)
    if problems:
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        raise DataError(f"{source}: {count}; fix or remove them:\n{list_problems(problems)}")
    return Rows(source, first, tuple(row for _, row in rows), tuple(ignored), unit)


def parse_row(line: str, prefer: str | None = None) -> tuple[str, dict[str, Any], list[str]]:
    """Return the kind of a line, its values, and the keys that are ignored.

    Raises:
      ValueError: what is wrong with the row, in a few words.

    >>> parse_row('{"prompt": "1 + 1 =", "completion": " 2", "id": 7}')
    ('completion', {'prompt': '1 + 1 =', 'completion': ' 2'}, ['id'])
    """
    return read_row(_parse(line), prefer)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None


def _label_problems(rows: list[Row], unit: str) -> list[str]:
    """Describe the labels that are not of the first one's type: all strings, or all integers."""
    first = type(rows[0].values["label"])
    return [
        f"{unit} {row.line}: the label {shown(repr(row.values['label']))} has another "
        f"type than {shown(repr(rows[0].values['label']))} in {unit} {rows[0].line}"
        for row in rows
        if type(row.values["label"]) is not first
    ]
