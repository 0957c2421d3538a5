"""What a run was started with, so that only the same run can be resumed."""

import datetime
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.foreign import shown
from lora_jax.files.disk import strict_json
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.files.disk.fingerprint import fingerprint, weak_entries
from lora_jax.files.disk.processes import to_host
from lora_jax.training.batching import Source
from lora_jax.training.errors import TrainingError

RUN_FILE = "run.json"
_STARTED = "started"
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what reading a record raises
_SHOWN = 3  # files of a directory that is not a run's


def started(directory: Path, resume: bool) -> datetime.datetime:
    """Return when the run in a directory was started, or the present for a new run.

    A chat template may write the day into every row; a run that is resumed keeps that of its start.
    """
    try:
        record = _read(directory) if resume else {}
        return datetime.datetime.fromisoformat(record[_STARTED])
    except (OSError, *_DAMAGED):  # `begin` tells what is wrong with the file
        return datetime.datetime.now().replace(microsecond=0)


def identity(
    settings: Mapping[str, Any],
    base: Any,
    data: Source,
    held_out: Source | None,
    now: datetime.datetime | None = None,
    weak: Collection[str] = (),
) -> dict[str, Any]:
    """Return everything that decides what a run computes, as JSON values.

    Args:
      settings: options by name, as plain JSON.
      base: the parameter tree; dtypes, shapes and checksums are recorded.
      data: token ids and masks; a checksum is recorded.
      held_out: likewise.
      now: from `started`; it is recorded, and does not tell runs apart.
      weak: from `older_checksums`.
    """
    return {
        **({_STARTED: now.isoformat()} if now else {}),
        "settings": json.loads(json.dumps(dict(settings))),
        "base": fingerprint(base, weak=weak),
        "data": {
            "training": data.checksum(),
            "held-out": None if held_out is None else held_out.checksum(),
        },
    }


def check_directory(directory: Path, resume: bool) -> bool:
    """Check that a directory may become a run's, or is one to resume; nothing is written.

    Returns:
      Whether there is a run to resume.

    Raises:
      TrainingError: there is a run and `resume` is false, or files that are not a run's, or no
        directory.
    """
    if (directory / RUN_FILE).exists():
        if resume:
            return True
        raise TrainingError(
            f"{directory} already contains a run. Add --resume to continue it, or choose another "
            "--out"
        )
    if directory.exists() and not directory.is_dir():
        raise TrainingError(f"{directory}: is not a directory; choose another --out")
    files = sorted(directory.iterdir()) if directory.exists() else []
    names = [shown(file.name) for file in files if not file.name.startswith(".")]
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        raise TrainingError(
            f"{directory}: contains files that are not a run's ({', '.join(names[:_SHOWN])}{more});"
            " choose another --out, a new or an empty directory"
        )
    return False


def begin(
    directory: Path, this: Mapping[str, Any], resume: bool, free: Collection[str] = ()
) -> bool:
    """Claim a directory for a run, or check that the run in it is this one.

    Args:
      directory: created if missing.
      this: from `identity`.
      resume: whether the directory may contain a run.
      free: names of settings that may differ; `write` records their new values.

    Returns:
      Whether there was a run to resume.

    Raises:
      TrainingError: as `check_directory`, or the run was started with other settings, data or base;
        all differences are listed.
    """
    if not check_directory(directory, resume):
        write(directory, this)
        return False
    problems = _from_file(directory, lambda before: list_differences(before, this, free))
    if problems:
        raise TrainingError(
            f"the run in {directory} was started with different settings, so it cannot be resumed. "
            "Use the same options, or choose another --out. Differences:\n" + "\n".join(problems)
        )
    return True


def write(directory: Path, this: Mapping[str, Any]) -> None:
    """Record what a run was started with, or has been changed to."""
    write_atomically(directory / RUN_FILE, (json.dumps(this, indent=1) + "\n").encode())


def recorded(directory: Path, name: str) -> Any:
    """Return the value of a setting that a run was started with; None if it was not given.

    Raises:
      TrainingError: the record is damaged.
    """
    return _from_file(directory, lambda before: before["settings"].get(name))


def older_checksums(directory: Path) -> list[str]:
    """Return the paths whose weights were recorded by an older release, to compare them likewise.

    Raises:
      TrainingError: the record is damaged.
    """
    return _from_file(directory, lambda before: weak_entries(before["base"]))


def _from_file(directory: Path, read: Callable[[Mapping[str, Any]], Any]) -> Any:
    try:
        return read(_read(directory))
    except _DAMAGED as error:
        raise TrainingError(
            f"{directory / RUN_FILE} is damaged ({shown(error)}). Start again with another --out"
        ) from None


def _read(directory: Path) -> Any:
    data = (directory / RUN_FILE).read_bytes()
    return strict_json.parse_json(data, RUN_FILE, TrainingError)


def list_differences(
    before: Mapping[str, Any], this: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Describe what differs between two runs, one line per difference.

    Args:
      before: from `identity`.
      this: likewise.
      free: names of settings that may differ.

    >>> run = {"settings": {"rank": 8}, "base": {}, "data": {}}
    >>> list_differences(run, {**run, "settings": {"rank": 4}})
    ['rank was 8, now 4']
    """
    was, now = before["settings"], this["settings"]
    lines = [
        f"{name} was {_show(was, name)}, now {_show(now, name)}"
        for name in {**was, **now}
        if name not in free and was.get(name) != now.get(name)
    ]
    lines += [
        f"the {part} data is different"
        for part, digest in this["data"].items()
        if digest != before["data"].get(part)
    ]
    was, now = before["base"], this["base"]
    leaves = [path for path in {**was, **now} if was.get(path) != now.get(path)]
    if leaves:
        lines.append(
            f"the model is different: {len(leaves)} of {len(now)} arrays, {leaves[0]} first"
        )
    return lines


def _show(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not given"


def checksum(tree: Any) -> str:
    """Return a short checksum of all values of a tree of arrays."""
    digest = hashlib.sha256()
    for x in to_host(jax.tree.leaves(tree)):
        digest.update(f"{x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]
