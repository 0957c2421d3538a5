"""The files that random options name: models, adapters and data, all small."""

import dataclasses
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli import files
from tests.cli.train.command import jsonl

KINDS = ("text", "completion", "chat", "label", "preference")
#: A task -> the kinds of rows that it takes.
TAKES = {
    "causal-lm": ("text", "completion", "chat"),
    "classification": ("label",),
    **dict.fromkeys(("dpo", "orpo", "cpo", "simpo"), ("preference",)),
}


def build(folder: Path) -> None:
    """Write everything once; the working directory is to be `folder`."""
    files.model(folder / "model")
    files.encoder(folder / "encoder")
    files.peft(folder / "peft")
    files.mlx(folder / "mlx")
    files.native(folder / "native.safetensors")
    files.kohya(folder / "style.safetensors")
    for kind in KINDS:
        jsonl(folder / f"{kind}.jsonl", kind)
    (folder / "play.txt").write_text("To be, or not to be.\n" * 20)
    (folder / "empty.txt").write_text("")
    (folder / "shards").mkdir()
    for name in ("train", "test"):
        jsonl(folder / "shards" / f"{name}.jsonl", "text")


@dataclasses.dataclass(frozen=True)
class Odd:
    """A data file that may be damaged."""

    name: str
    content: bytes


_VALUES: tuple[Any, ...] = (
    *(None, "", " ", 0, 1.5, True, [], {}, ["a"], {"a": [1]}, "x" * 3000, "\u0000", "é\u2028\n"),
    *("<s>", "\ud800", [[]], [None], [{"role": "user"}], -1, 10**30, "0", float("nan")),
)


def odd_file(draw: random.Random, kind: str, name: str) -> Odd:
    """Return rows of a kind with some damage, in some format."""
    rows = [json.loads(line) for line in _lines(kind)]
    for _ in range(draw.randrange(4)):
        draw.choice(_ROW_EDITS)(draw, rows)
    suffix = draw.choice([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".ndjson", ".dat"])
    data = _written(draw, rows, suffix)
    for _ in range(draw.choice([0, 0, 1, 2])):
        data = draw.choice(_BYTE_EDITS)(draw, data)
    if draw.random() < 0.1:
        data, suffix = gzip.compress(data), f"{suffix}.gz"
        data = data[: draw.choice([len(data), len(data), len(data) // 2])]
    return Odd(f"{name}{suffix}", data)


def _lines(kind: str) -> list[str]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return jsonl(Path(folder) / "x.jsonl", kind).read_text().splitlines()


def _a_row(draw: random.Random, rows: list[Any]) -> Any:
    found = [row for row in rows if isinstance(row, dict) and row]
    return draw.choice(found) if found else {}


def _set(draw: random.Random, rows: list[Any]) -> None:
    row = _a_row(draw, rows)
    if row:
        row[draw.choice([*row])] = draw.choice(_VALUES)


def _drop(draw: random.Random, rows: list[Any]) -> None:
    row = _a_row(draw, rows)
    if row:
        del row[draw.choice([*row])]


def _add(draw: random.Random, rows: list[Any]) -> None:
    names = ("text", "label", "messages", "id", "", "prompt", "chosen", "weights", "tools")
    _a_row(draw, rows)[draw.choice(names)] = draw.choice(_VALUES)


def _inner(draw: random.Random, rows: list[Any]) -> None:
    turns = _a_row(draw, rows).get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        turn = draw.choice([x for x in turns if isinstance(x, dict)])
        turn[draw.choice(["role", "content"])] = draw.choice((*_VALUES, "system", "tool", "x"))


def _few(draw: random.Random, rows: list[Any]) -> None:
    del rows[draw.choice([0, 1]) :]


def _other(draw: random.Random, rows: list[Any]) -> None:
    rows.insert(draw.randrange(len(rows) + 1), draw.choice([*_VALUES, {"text": "Hi"}]))


def _mixed(draw: random.Random, rows: list[Any]) -> None:
    rows += [json.loads(line) for line in _lines(draw.choice(KINDS))[:1]]


_ROW_EDITS: tuple[Callable[[random.Random, list[Any]], None], ...] = (
    *(_set, _set, _drop, _add, _inner, _few, _other, _mixed),
)


def _written(draw: random.Random, rows: list[Any], suffix: str) -> bytes:
    dumped = [json.dumps(row) for row in rows]
    if suffix == ".json":
        return f"[{', '.join(dumped)}]".encode()
    if suffix in (".csv", ".tsv"):
        keys = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        mark = "," if suffix == ".csv" else "\t"
        cell = lambda x: x if isinstance(x, str) and draw.random() < 0.7 else json.dumps(x)
        lines = [keys, *([cell(row.get(k)) for k in keys] for row in rows if isinstance(row, dict))]
        quoted = [mark.join('"{}"'.format(x.replace('"', '""')) for x in line) for line in lines]
        return "\n".join(quoted).encode("utf-8", "surrogatepass")
    return "\n".join(dumped).encode()


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _insert(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    odd = (b"\x00", b"\xff", b"\n\n", b"\r\n", b'"', b"{", b"\t", b"\xe2\x80\xa8", b" ", b"," * 50)
    return data[:place] + draw.choice(odd) + data[place:]


_BYTE_EDITS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_cut, _insert, _insert),
    lambda draw, data: b"\xef\xbb\xbf" + data,
    lambda draw, data: data.replace(b"\n", b"\r\n"),
    lambda draw, data: data.decode("utf-8", "replace").encode("utf-16"),
    lambda draw, data: b"",
    lambda draw, data: data * 20,
)
