"""One run of `lora-jax train`, and what may be wrong with how it ends."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.cli import main
from lora_jax.files import kinds
from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file
from lora_jax.training import log

SECONDS = 240  # of one run
_MODELS = ("model",)  # what --full leaves
_FILES = ("adapter", "adapter.safetensors", "best", "best.safetensors", *_MODELS)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def command(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(["lora-jax", *self.words])


def run(words: Sequence[str]) -> Ended:
    """Run a command in this process, for so many `SECONDS` at most."""
    out, err = io.StringIO(), io.StringIO()

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*words])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else -1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ended(tuple(words), status, out.getvalue(), err.getvalue())


def problems(ended: Ended, directory: Path) -> list[str]:
    """Return what is wrong with the end of a run that wrote into `directory`."""
    found = []
    if ended.status == 0:
        found += _of_success(directory)
        if "error: " in ended.err:
            found.append(f"succeeds, but says {ended.err[-300:]!r}")
    else:
        found += _of_failure(ended, directory)
    steering = {c for c in ended.err + ended.out if not c.isprintable() and c != "\n"}
    if steering:
        found.append(f"prints {sorted(steering)!r}")
    return found


def _of_success(directory: Path) -> list[str]:
    there = [name for name in _FILES if (directory / name).exists()]
    if not {*there} - {"best", "best.safetensors"}:
        return [f"succeeds without an adapter: {sorted(os.listdir(directory))}"]
    return list(_damaged(directory, there))


def _damaged(directory: Path, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            found = kinds.detect(directory / name)
            if found.kind != kinds.CHECKPOINT:
                read_factors(directory / name)
        except Exception as error:
            yield f"{name} cannot be read: {error!r:.200}"


def _of_failure(ended: Ended, directory: Path) -> Iterator[str]:
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or not ended.err.endswith(f"{errors[0]}\n"):
        yield f"{len(errors)} lines of error: {ended.err[-600:]!r}"
        return
    (line,) = errors
    if "Traceback" in ended.err or "bug in lora-jax" in line:
        yield f"not foreseen: {line[:600]}"
    if ended.status not in (1, 2):
        yield f"status {ended.status}: {line[:300]}"
    if len(line) > 3000:
        yield f"{len(line)} characters: {line[:300]}"
    values = [x for x in ended.words if len(x) > 1 and not x.startswith("-")]
    has_file = re.search(r"\w\.(jsonl|txt|yaml|json)|cannot read", line)
    if "--" not in line and not has_file and not any(x.partition("=")[0] in line for x in values):
        yield f"names neither an option nor a file: {line[:300]}"
    there = [name for name in _FILES if (directory / name).exists()]
    if there:
        yield f"fails and leaves {there}: {line[:300]}"
        yield from _damaged(directory, there)


def outcome(ended: Ended, directory: Path) -> dict[str, Any]:
    """Return all that can be seen of a run but times and paths."""
    files = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and not name.startswith(("checkpoints/", "tensorboard/", "profile/")):
            files[name] = _content(path) if path.suffix == ".safetensors" else None
    records = log.read(directory / "log.jsonl") if (directory / "log.jsonl").exists() else []
    said = [line for line in ended.err.splitlines() if "note" in line or "parameter" in line]
    steps = sorted(path.name for path in (directory / "checkpoints").glob("[0-9]*"))
    return {
        "status": ended.status,
        "files": files,
        "log": [log.without_speed(record) for record in records],
        "said": said,
        "lines": len(ended.err.splitlines()),
        "checkpoints": steps,
    }


def _content(path: Path) -> Any:
    """Return the tensors as bytes, and the metadata, whose order in the file is random."""
    tensors, metadata = safetensors_file.read(path, finite=False)
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}, metadata


def fresh(directory: Path) -> Path:
    """Return a path where nothing is."""
    shutil.rmtree(directory, ignore_errors=True)
    return directory
