"""Damaged files of a run and of its data: checkpoints, log, settings, rows, namings."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from lora_jax.cli.jobs.adapter_files.convert import read_naming
from lora_jax.core.errors import StructureError
from lora_jax.training import log, run_record
from lora_jax.training.batching import Data
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.dataset import read_rows
from lora_jax.training.streaming.pieces import divide, read_piece
from tests.cli import files as written
from tests.stress.damaged_files.command_line import files_of
from tests.stress.damaged_files.subject import Subject, Verdict, read_files

STEPS = (3, 6)
STATE = {"step": np.int32(0), "adapters": {"a": np.ones((4, 2), np.float32)}, "opt": (np.ones(3),)}


def _state(step: int) -> Any:
    return jax.tree.map(lambda x: (x + step).astype(np.asarray(x).dtype), _like())


def _like() -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.asarray(x).dtype.newbyteorder("=")), STATE32)


STATE32 = jax.tree.map(lambda x: np.asarray(x, np.float32), STATE)


def checkpoints() -> Subject:
    """Two checkpoints of one run; what is restored must be one of them, under its own step."""
    with TemporaryDirectory() as folder:
        with Checkpoints(Path(folder) / "checkpoints") as made:
            for step in STEPS:
                made.save(step, _state(step))
        files = read_files(Path(folder))

    def load(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was moved to unreadable/")
            with Checkpoints(folder / "checkpoints") as found:
                return found.restore(_like())

    def judge(found: Any, folder: Path) -> Verdict:
        if found is None:
            return "none there", ""
        step, state = found
        if step not in STEPS:
            return "loads what it should not", f"step {step}"
        same = jax.tree.map(lambda x, y: bool((np.asarray(x) == y).all()), state, _state(step))
        if not all(jax.tree.leaves(same)):
            return "loads what it should not", f"step {step} holds {state}"
        return f"restores step {step}", ""

    return Subject(files, load, judge, writes=True)


def run() -> Subject:
    """`run.json` and `log.jsonl`, as resuming reads them."""
    data = Data({"ids": np.ones((1, 2), np.int32), "weights": np.ones((1, 2), np.float32)})
    identity = run_record.identity({"rank": 8}, {"a": np.ones(3, np.float32)}, data, None)
    records = [{"step": n, "loss": 1.0, "eval_loss": 2.0} for n in range(4)]
    files = {
        "run.json": json.dumps(identity).encode(),
        "log.jsonl": b"".join(json.dumps(record).encode() + b"\n" for record in records),
    }

    def load(folder: Path) -> Any:
        assert run_record.started(folder, resume=True).year > 0
        run_record.begin(folder, identity, resume=True)
        found = log.rewind(folder / "log.jsonl", 2)
        return log.losses(found), log.evaluations(found)

    return Subject(files, load, lambda *_: ("loads", ""), writes=True)


ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a b"},
    "completion": {"prompt": "a", "completion": "b"},
    "chat": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "label": {"text": "a", "label": "x"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "Alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "d"},
}
COMPRESSED = (".jsonl.gz", ".jsonl.zst")  # which cannot be streamed
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", *COMPRESSED)


def data(kind: str, suffix: str, streamed: bool) -> Subject:
    """Rows of one kind in one format of file, read whole or in pieces."""
    rows = [ROWS[kind]] * 3
    if suffix == ".parquet":
        from pyarrow import Table, parquet

        table = Table.from_pylist([{k: json.dumps(x) for k, x in row.items()} for row in rows])
        files = files_of(lambda folder: parquet.write_table(table, folder / "rows.parquet"))
    elif suffix == ".arrow":
        from pyarrow import BufferOutputStream, RecordBatch, ipc

        sink, table = (
            BufferOutputStream(),
            RecordBatch.from_pylist([{k: json.dumps(x) for k, x in row.items()} for row in rows]),
        )
        with ipc.new_stream(sink, table.schema) as writer:
            writer.write_batch(table)
        files = {"rows.arrow": sink.getvalue().to_pybytes()}
    elif suffix == ".csv":
        lines = [",".join(ROWS[kind]), *(",".join(map(str, row.values())) for row in rows)]
        files = {"rows.csv": "\n".join(lines).encode()}
    elif suffix == ".json":
        files = {"rows.json": json.dumps(rows).encode()}
    else:
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        files = {f"rows{suffix}": _compressed(lines, suffix)}
    (name,) = files

    def load(folder: Path) -> Any:
        if not streamed:
            return read_rows(folder / name)
        pieces = divide([folder / name], size=20)
        return [read_piece(piece, "utf-8") for piece in pieces]

    return Subject(files, load, lambda *_: ("loads", ""))


def _compressed(data: bytes, suffix: str) -> bytes:
    import pyarrow

    codecs = {".gz": "gzip", ".zst": "zstd"}
    codec = next((name for end, name in codecs.items() if suffix.endswith(end)), None)
    return data if codec is None else pyarrow.compress(data, codec=codec, asbytes=True)


def naming() -> Subject:
    """The JSON file of `--naming`, used on a tree."""
    files = files_of(lambda folder: written.naming(folder / "naming.json"))

    def load(folder: Path) -> Any:
        found = read_naming(folder / "naming.json")
        try:
            return found.places({"q_proj/kernel": (2, 12, 8), "v_proj/kernel": (2, 12, 8)})
        except StructureError:  # says which leaf does not fit: a tree has no file
            return None

    return Subject(files, load, lambda *_: ("loads", ""))
