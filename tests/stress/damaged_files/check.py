"""Read a damaged file, and judge whether the outcome is acceptable."""

import ctypes
import functools
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lora_jax import LoraError
from lora_jax.core.foreign import MOST_OF_MESSAGE
from tests.stress.damaged_files import readers
from tests.stress.damaged_files.edits import mutate
from tests.stress.damaged_files.subject import Subject, write_files

SLOW = 5.0  # seconds that reading a few kilobytes must not take
MEMORY = 50 * 2**20  # bytes beside the file's own size


class Result(NamedTuple):
    """What became of one file."""

    number: int
    reader: str
    name: str
    how: str
    outcome: str
    problem: str
    seconds: float
    grown: int = 0  # bytes that the process grew by while it was read


@dataclass
class Tally:
    """Counts of the outcomes."""

    outcomes: Counter = field(default_factory=Counter)  # (reader, outcome)
    problems: list[Result] = field(default_factory=list)
    slowest: Counter = field(default_factory=Counter)  # seconds by reader
    grown: Counter = field(default_factory=Counter)  # bytes by reader

    def add(self, result: Result) -> None:
        self.outcomes[result.reader, result.outcome] += 1
        self.slowest[result.reader] = max(self.slowest[result.reader], result.seconds)
        self.grown[result.reader] = max(self.grown[result.reader], result.grown)
        if result.problem:
            self.problems.append(result)


def mutation(seed: int, number: int, among: Sequence[str]) -> tuple[str, str, Any, str]:
    """Return the reader and the subject of a number, the damaged files, and how they are so."""
    rng = Random(f"{seed} {number}")
    reader, name = readers.name(number, among)
    files, how = mutate(readers.subject(reader, name).files, rng)
    return reader, name, files, how


def run(seed: int, numbers: Sequence[int], among: Sequence[str]) -> Tally:
    """Damage, read and judge."""
    tally = Tally()
    for result in results(seed, numbers, among):
        tally.add(result)
    return tally


def results(
    seed: int, numbers: Sequence[int], among: Sequence[str], measured: bool = False
) -> Iterator[Result]:
    """Yield what became of each file; with `measured` memory counts, in a process of one thread."""
    with TemporaryDirectory() as folder:
        for number in numbers:
            reader, name, files, how = mutation(seed, number, among)
            chosen = readers.subject(reader, name)
            read = functools.partial(judge, chosen, files)
            allowed = MEMORY + sum(map(len, files.values()))
            start = time.process_time()  # whatever else the machine does
            place = Path(folder) / str(number)
            (outcome, problem), grown = growth(read, place) if measured else (read(place), 0)
            seconds = time.process_time() - start
            for again in range(2 if measured and grown > allowed else 0):
                # what an import or a compilation needs is needed once
                grown = min(grown, growth(read, Path(folder) / f"{number} again {again}")[1])
            if not problem and seconds > SLOW:
                outcome, problem = "slow", f"took {seconds:.0f} s"
            if measured and not problem and grown > allowed:
                outcome, problem = "much memory", f"grew by {grown / 2**20:.0f} MB"
            yield Result(number, reader, name, how, outcome, problem, seconds, grown)


def growth(read: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Return what a function returns, and by how many bytes the process grew at most meanwhile.

    This is for Linux alone.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _status("VmRSS")
    found = read(*args)
    return found, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def judge(chosen: Subject, files: dict[str, bytes], folder: Path) -> tuple[str, str]:
    """Return the outcome, and what is wrong with it, if anything."""
    folder.mkdir()
    write_files(folder, files)
    before = _listing(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = chosen.load(folder)
        outcome, problem = chosen.judge(loaded, folder)
    except (LoraError, FileNotFoundError) as error:
        outcome, problem = "clear error", _message_problem(str(error), folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, problem = "other exception", "".join(traceback.format_exception(error)[-4:])
    if not problem and not chosen.writes and _listing(folder) != before:
        outcome, problem = "written", f"{before} became {_listing(folder)}"
    return ("unclear error" if problem and outcome == "clear error" else outcome), problem


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))]


def _message_problem(message: str, folder: Path) -> str:
    if str(folder) not in message:
        return f"the message does not name the file: {message:.300}"
    if len(message) > 1.1 * MOST_OF_MESSAGE:
        return f"a message of {len(message)} characters"
    steering = [c for c in message if not c.isprintable() and c != "\n"]
    return f"the message holds {steering[:5]!r}" if steering else ""
