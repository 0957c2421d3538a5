"""Read a damaged file, and judge whether the outcome is acceptable."""

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from lora_jax import LoraError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import Adapted, TrainedLeaf, TrainedRows, check_fits
from tests.stress.damaged_files.edits import mutate
from tests.stress.damaged_files.subjects import Subject, name, subject

SLOW = 5.0  # seconds that reading a few kilobytes must not take
LONG = 100_000  # characters of a message


@dataclass
class Tally:
    """Counts of the outcomes of the mutations."""

    outcomes: Counter = field(default_factory=Counter)  # (format, outcome)
    problems: list[tuple[str, int, str, str]] = field(default_factory=list)
    slowest: float = 0.0


def mutation(seed: int, number: int, formats: Sequence[str]) -> tuple[Subject, Any, str]:
    """Return the subject of a mutation, its damaged files, and how they are damaged."""
    rng = Random(f"{seed} {number}")
    chosen = subject(name(number, formats))
    files, how = mutate(chosen.files, rng)
    return chosen, files, how


def run(seed: int, numbers: Sequence[int], formats: Sequence[str]) -> Tally:
    """Damage, read and judge."""
    tally = Tally()
    with TemporaryDirectory() as folder:
        for number in numbers:
            chosen, files, how = mutation(seed, number, formats)
            start = time.perf_counter()
            outcome, problem = judge(chosen, files, Path(folder) / str(number))
            seconds = time.perf_counter() - start
            tally.slowest = max(tally.slowest, seconds)
            if not problem and seconds > SLOW:
                outcome, problem = "slow", f"took {seconds:.0f} s"
            tally.outcomes[chosen.name.split()[0], outcome] += 1
            if problem:
                tally.problems.append((chosen.name, number, how, problem))
    return tally


def judge(chosen: Subject, files: dict[str, bytes], folder: Path) -> tuple[str, str]:
    """Return the outcome, and what is wrong with it, if anything."""
    folder.mkdir()
    _write(folder, files)
    before = _listing(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapters = chosen.load(folder)
    except LoraError as error:
        outcome, problem = "clear error", _message_problem(str(error), folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, problem = "other exception", "".join(traceback.format_exception(error)[-4:])
    else:
        outcome, problem = _loaded(chosen, adapters)
    if not problem and _listing(folder) != before:
        outcome, problem = "written", f"{before} became {_listing(folder)}"
    return ("unclear error" if problem and outcome == "clear error" else outcome), problem


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for file, data in files.items():
        (folder / file).write_bytes(data)


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))]


def _message_problem(message: str, folder: Path) -> str:
    if str(folder) not in message:
        return f"the message does not name the file: {message:.300}"
    if len(message) > LONG:
        return f"a message of {len(message)} characters"
    steering = [c for c in message if not c.isprintable() and c != "\n"]
    return f"the message holds {steering[:5]!r}" if steering else ""


def _loaded(chosen: Subject, adapters: Any) -> tuple[str, str]:
    bases = _by_path(chosen.base)
    nodes = adapted_nodes(adapters)
    problems = [
        line
        for path, node in nodes.items()
        for line in (check_fits(path, node, bases[path]) if path in bases else [f"{path}: unknown"])
    ]
    problems += [f"{path}: {node}" for path, node in nodes.items() if not _is_sane(node)]
    leaves = [np.asarray(x) for x in jax.tree.leaves(adapters)]
    if not nodes:
        problems.append("an adapter of nothing")
    if not all(np.isfinite(x.astype(np.float32)).all() for x in leaves):
        problems.append("values that are not finite")
    if problems:
        return "loads what it should not", "; ".join(problems)
    want = _original(chosen)
    same = jax.tree.structure(adapters) == jax.tree.structure(want) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves, jax.tree.leaves(want), strict=True)
    )
    return ("loads, equal" if same else "loads, other finite values that fit"), ""


def _is_sane(node: Adapted) -> bool:
    """Return whether the static fields have the types and values that the package relies on."""
    if isinstance(node, TrainedLeaf):
        return True
    uses = isinstance(node.layout.uses, tuple) and all(type(use) is str for use in node.layout.uses)
    if isinstance(node, TrainedRows):
        rows = isinstance(node.rows, tuple) and all(type(row) is int for row in node.rows)
        axis = type(node.axis) is int and node.axis in node.layout.positions("io")
        return uses and rows and axis and len(set(node.rows)) == len(node.rows)
    return uses and type(node.dropout) is float and 0 <= node.dropout < 1


_ORIGINALS: dict[str, Any] = {}


def _original(chosen: Subject) -> Any:
    if chosen.name not in _ORIGINALS:
        with TemporaryDirectory() as folder:
            _write(Path(folder), chosen.files)
            _ORIGINALS[chosen.name] = chosen.load(Path(folder))
    return _ORIGINALS[chosen.name]


def _by_path(base: Any) -> dict[str, Any]:
    return flatten_with_paths(base)[0]
