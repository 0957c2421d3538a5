"""What a run directory was begun with, so that a resumed run is the same run."""

from __future__ import annotations

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

FILE = "run.json"


def identity(
    settings: Mapping[str, Any], base: Any, data: Data, held_out: Data | None
) -> dict[str, Any]:
    """All that decides what a run computes, as JSON values.

    Args:
      settings: names of options and their values, plain JSON.
      base: the parameter tree, of which dtypes, shapes and checksums are kept.
      data: token ids and masks, of which a checksum is kept.
      held_out: likewise.
    """
    return {
        "settings": json.loads(json.dumps(dict(settings))),
        "base": fingerprint(base),
        "data": {
            "training": _digest(data),
            "held-out": None if held_out is None else _digest(held_out),
        },
    }


def begin(directory: Path, this: Mapping[str, Any], resume: bool) -> bool:
    """Takes a directory for a run, or checks that the run in it is this one.

    Args:
      directory: made if need be.
      this: from `identity`.
      resume: whether a run may be there already.

    Returns:
      Whether there was a run to resume.

    Raises:
      TrainingError: there is a run and `resume` is not set, or it is set and settings, data or base
        are not those the run was begun with; all differences are listed.
    """
    file = directory / FILE
    if not file.exists():
        write_atomically(file, (json.dumps(this, indent=1) + "\n").encode())
        return False
    if not resume:
        raise TrainingError(
            f"{directory} holds a run already: add --resume to go on with it, or choose another "
            "--out"
        )
    try:
        before = json.loads(file.read_text("utf-8"))
        problems = differences(before, this)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file} is damaged ({error}); start anew in another --out") from None
    if problems:
        raise TrainingError(
            f"{directory} was begun otherwise; give the same options, or start anew in another "
            "--out:\n" + "\n".join(problems)
        )
    return True


def differences(before: Mapping[str, Any], this: Mapping[str, Any]) -> list[str]:
    """What tells two runs apart, a line each.

    >>> run = {"settings": {"rank": 8}, "base": {}, "data": {}}
    >>> differences(run, {**run, "settings": {"rank": 4}})
    ['rank was 8, is 4']
    """
    was, now = before["settings"], this["settings"]
    lines = [
        f"{name} was {_shown(was, name)}, is {_shown(now, name)}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    lines += [
        f"the {part} data are others"
        for part, digest in this["data"].items()
        if digest != before["data"].get(part)
    ]
    was, now = before["base"], this["base"]
    leaves = [path for path in {**was, **now} if was.get(path) != now.get(path)]
    if leaves:
        lines.append(
            f"the model is another: {len(leaves)} of {len(now)} arrays differ, {leaves[0]} first"
        )
    return lines


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not given"


def _digest(data: Data) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(data.arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
