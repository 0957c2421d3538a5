"""What a run was started with, so that only the same run can be resumed."""

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.disk.atomic import write_atomically
from lora_jax.files.disk.fingerprint import fingerprint
from lora_jax.training.batching import Data
from lora_jax.training.errors import TrainingError

RUN_FILE = "run.json"
_STARTED = "started"
#: What reading a damaged record raises.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def started(directory: Path, resume: bool) -> datetime.datetime:
    """Return when the run in a directory was started, or the present for a new run.

    A chat template may write the day into every row; a run that is resumed keeps that of its start.
    """
    try:
        record = json.loads((directory / RUN_FILE).read_text("utf-8")) if resume else {}
        return datetime.datetime.fromisoformat(record[_STARTED])
    except (OSError, *_DAMAGED):  # `begin` tells what is wrong with the file
        return datetime.datetime.now().replace(microsecond=0)


def identity(
    settings: Mapping[str, Any],
    base: Any,
    data: Data,
    held_out: Data | None,
    now: datetime.datetime | None = None,
) -> dict[str, Any]:
    """Return everything that decides what a run computes, as JSON values.

    Args:
      settings: options by name, as plain JSON.
      base: the parameter tree; dtypes, shapes and checksums are recorded.
      data: token ids and masks; a checksum is recorded.
      held_out: likewise.
      now: from `started`; it is recorded, and does not tell runs apart.
    """
    return {
        **({_STARTED: now.isoformat()} if now else {}),
        "settings": json.loads(json.dumps(dict(settings))),
        "base": fingerprint(base),
        "data": {
            "training": _digest(data),
            "held-out": None if held_out is None else _digest(held_out),
        },
    }


def begin(directory: Path, this: Mapping[str, Any], resume: bool) -> bool:
    """Claim a directory for a run, or check that the run in it is this one.

    Args:
      directory: created if missing.
      this: from `identity`.
      resume: whether the directory may contain a run.

    Returns:
      Whether there was a run to resume.

    Raises:
      TrainingError: there is a run and `resume` is false, or it is true and the run was started
        with other settings, data or base; all differences are listed.
    """
    file = directory / RUN_FILE
    if not file.exists():
        write_atomically(file, (json.dumps(this, indent=1) + "\n").encode())
        return False
    if not resume:
        raise TrainingError(
            f"{directory} already contains a run. Add --resume to continue it, or choose another "
            "--out"
        )
    try:
        before = json.loads(file.read_text("utf-8"))
        problems = list_differences(before, this)
    except _DAMAGED as error:
        raise TrainingError(
            f"{file} is damaged ({error}). Start again with another --out"
        ) from None
    if problems:
        raise TrainingError(
            f"the run in {directory} was started with different settings, so it cannot be resumed. "
            "Use the same options, or choose another --out. Differences:\n" + "\n".join(problems)
        )
    return True


def list_differences(before: Mapping[str, Any], this: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two runs, one line per difference.

    >>> run = {"settings": {"rank": 8}, "base": {}, "data": {}}
    >>> list_differences(run, {**run, "settings": {"rank": 4}})
    ['rank was 8, now 4']
    """
    was, now = before["settings"], this["settings"]
    lines = [
        f"{name} was {_show(was, name)}, now {_show(now, name)}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
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


def _digest(data: Data) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(data.arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
