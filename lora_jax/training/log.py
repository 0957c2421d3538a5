"""The log of a run: one JSON object per line, for a step or an evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.checks import is_integer, is_number
from lora_jax.files.disk.atomic import naming_path, write_atomically

Record = Mapping[str, Any]


def append(path: Path, record: Record) -> None:
    """Append one line, which survives even if the process is killed."""
    with naming_path(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without lines that are damaged; none without a file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            records.append(record)
    return records


def _is_record(x: Any) -> bool:
    """Return whether a line holds a step and, where it names losses, numbers."""
    if not isinstance(x, dict) or not is_integer(x.get("step")):
        return False
    return all(is_number(x[name]) for name in ("loss", "eval_loss") if name in x)


def read_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the records up to `step`."""
    return [record for record in read(path) if record["step"] <= step]


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records after `step`, which a resumed run writes again, and return the others."""
    kept = read_until(path, step)
    if path.exists():
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
    return kept


def without_speed(record: Record) -> dict[str, Any]:
    """Return a record without what differs between two runs of the same steps: time and memory."""
    return {name: x for name, x in record.items() if name not in _OF_THE_MACHINE}


_OF_THE_MACHINE = {
    *("seconds", "eval_seconds", "tokens_per_second", "flops", "flops_per_second", "peak_bytes"),
}


def losses(records: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return the steps and their training losses."""
    found = [(r["step"], r["loss"]) for r in records if "loss" in r]
    return [step for step, _ in found], [loss for _, loss in found]


def evaluations_since_best(records: list[dict[str, Any]]) -> int:
    """Return how many evaluations follow the first one with the lowest loss.

    >>> evaluations_since_best([{"step": n, "eval_loss": x} for n, x in enumerate((3, 1, 2, 1))])
    2
    """
    found = [record["eval_loss"] for record in evaluations(records)]
    return len(found) - 1 - found.index(min(found)) if found else 0


def evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of evaluations."""
    return [record for record in records if "eval_loss" in record]
