"""Training data: JSON lines of four kinds, or one plain text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.training.errors import DataError, list_problems

# kind -> the keys of its rows
KEYS = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
}
STREAM = "stream"  # a .txt file: one text, not divided into rows
KNOWN = frozenset(key for keys in KEYS.values() for key in keys)
FORMS = (
    '{"text": …}, {"prompt": …, "completion": …}, {"messages": [{"role": …, "content": …}]} or '
    '{"text": …, "label": …}'
)


@dataclass(frozen=True)
class Row:
    """One row of a file, checked."""

    line: int  # line number, counted from 1
    values: Mapping[str, Any]  # by key; every string is non-empty and can be encoded


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


def read_rows(path: str | Path, encoding: str = "utf-8") -> Rows:
    """Read a `.jsonl` file, one JSON object per line, or a `.txt` file, a single text.

    Args:
      path: the file. Blank lines of a `.jsonl` file and a byte order mark are skipped.
      encoding: text encoding of the file, a name that Python knows.

    Raises:
      DataError: the file is missing or empty, has another suffix or another encoding (the message
        names the byte), or has bad rows or rows of several kinds (the first ten are listed by
        line number).
    """
    path = Path(path)
    text = decode_file(path, encoding)
    if path.suffix == ".txt":
        problem = _string_problem("text", text)
        if problem:
            raise DataError(f"{path}: {problem}; use a file that contains text")
        return Rows(str(path), STREAM, (Row(1, {"text": text}),))
    if path.suffix != ".jsonl":
        raise DataError(
            f"{path}: unknown file type; rename it to .jsonl (rows of {FORMS}) or .txt (one text)"
        )
    return _read_lines(str(path), text)


def decode_file(path: Path, encoding: str) -> str:
    """Return a file's text; raise `DataError` as `read_rows` does."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise DataError(f"{path}: unknown encoding {encoding!r}; try utf-8") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        other = "latin-1" if encoding.lower().replace("_", "-") != "latin-1" else "utf-8"
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not "
            f"valid {encoding}; convert the file, or name its encoding (perhaps --encoding {other})"
        ) from None


def _read_lines(source: str, text: str) -> Rows:
    """Return the rows of JSON lines."""
    problems: list[str] = []
    rows: list[tuple[str, Row]] = []
    ignored: dict[str, None] = {}
    # `splitlines` would also cut at characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            kind, values, others = parse_row(line)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        rows.append((kind, Row(number, values)))
        ignored |= dict.fromkeys(others)
    if not rows and not problems:
        raise DataError(f"{source}: the file is empty; it should contain rows of {FORMS}")
    first = rows[0][0] if rows else ""
    problems += [
        f"line {row.line} is a {kind} row, but line {rows[0][1].line} is a {first} row"
        for kind, row in rows
        if kind != first
    ]
    if not problems and first == "label":
        problems = _label_problems([row for _, row in rows])
    if problems:
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        raise DataError(f"{source}: {count}; fix or remove them:\n{list_problems(problems)}")
    return Rows(source, first, tuple(row for _, row in rows), tuple(ignored))


def parse_row(line: str) -> tuple[str, dict[str, Any], list[str]]:
    """Return the kind of a line, its values, and the keys that are ignored.

    Raises:
      ValueError: what is wrong with the row, in a few words.

    >>> parse_row('{"prompt": "1 + 1 =", "completion": " 2", "id": 7}')
    ('completion', {'prompt': '1 + 1 =', 'completion': ' 2'}, ['id'])
    """
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {_json_type(row)}, not an object")
    present = KNOWN & row.keys()
    kind = next((kind for kind, keys in KEYS.items() if present == set(keys)), None)
    if kind is None:
        keys = f"the keys {', '.join(map(repr, row))}" if row else "no keys"
        raise ValueError(f"has {keys}; a row must be {FORMS}")
    check = {"messages": _messages_problem, "label": _label_problem}
    found = (check.get(key, lambda x, k=key: _string_problem(k, x))(row[key]) for key in KEYS[kind])
    problem = next(filter(None, found), None)
    if problem:
        raise ValueError(problem)
    return kind, {key: row[key] for key in KEYS[kind]}, [key for key in row if key not in KNOWN]


def _string_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{name} is a JSON {_json_type(value)}, not a string"
    if not value.strip():
        return f"{name} is empty"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{name} contains half of a surrogate pair, which is not a character"
    return None


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"messages is {'an empty list' if messages == [] else 'not a list'}"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"messages[{i}] must have role and content"
        for key in ("role", "content"):
            problem = _string_problem(f"messages[{i}].{key}", message[key])
            if problem:
                return problem
    if all(message["role"] != "assistant" for message in messages):
        return "messages contains no assistant turn to train on"
    return None


def _label_problem(label: Any) -> str | None:
    if is_integer(label):
        return None
    return (
        "label is neither a string nor an integer"
        if not isinstance(label, str)
        else (_string_problem("label", label))
    )


def _label_problems(rows: list[Row]) -> list[str]:
    """Describe the labels that are not of the first one's type: all strings, or all integers."""
    first = type(rows[0].values["label"])
    return [
        f"line {row.line}: the label {row.values['label']!r} has another type than "
        f"{rows[0].values['label']!r} in line {rows[0].line}"
        for row in rows
        if type(row.values["label"]) is not first
    ]


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
