"""Which directories of a run are checkpoints of it, judged by their names and metadata.

Orbax takes every directory whose name is an integer for a step, and reads the metadata of all of
them when it opens their parent: one damaged directory would keep it from the others.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.files.disk.strict_json import parse_json
from lora_jax.training.errors import TrainingError

METADATA = "_CHECKPOINT_METADATA"
UNREADABLE = "unreadable"  # where damaged checkpoints are moved
STEP = "step"  # the key of the step's number in the metadata
_LARGEST = 2**31  # no run takes so many steps


def damaged(directory: Path) -> dict[str, str]:
    """Return the directories that stand for steps but cannot be, and why, by name.

    What no step is meant by (another name, a file) is left out.
    """
    if not directory.is_dir():
        return {}
    found = {path.name: _problem(path) for path in sorted(directory.iterdir()) if path.is_dir()}
    return {name: problem for name, problem in found.items() if problem}


def _problem(path: Path) -> str:
    """Return why a directory is not the checkpoint that its name says; empty if it may be."""
    try:
        step = int(path.name)
    except ValueError:
        return ""
    if str(step) != path.name or not 0 <= step < _LARGEST:
        return "its name is not the number of a step"
    try:
        text = (path / METADATA).read_bytes()
    except FileNotFoundError:
        return ""  # early versions of Orbax wrote none
    except OSError as error:
        return f"{METADATA} cannot be read: {error.strerror}"
    try:
        value = parse_json(text, METADATA, TrainingError)
    except TrainingError as error:
        return str(error)
    return _metadata_problem(value, step)


def _metadata_problem(value: Any, step: int) -> str:
    if not isinstance(value, Mapping):
        return f"{METADATA} is not an object"
    custom = value.get("custom_metadata")
    recorded = custom.get(STEP, step) if isinstance(custom, Mapping) else step
    if not is_integer(recorded) or recorded != step:
        return "it was saved as another step"
    return ""


def steps_in(directory: Path) -> list[str]:
    """Return the names of the directories that Orbax takes for steps."""
    return sorted(path.name for path in directory.iterdir() if path.name.isdecimal())


def move_away(directory: Path, name: str) -> Path:
    """Move a directory to those that cannot be read, and return where it is now."""
    target = directory / UNREADABLE / name
    target.parent.mkdir(exist_ok=True)
    number = 1
    while target.exists():
        number += 1
        target = directory / UNREADABLE / f"{name}-{number}"
    shutil.move(directory / name, target)
    return target


def moved_away(directory: Path) -> list[str]:
    """Return the names of the directories that were moved away."""
    place = directory / UNREADABLE
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []
