"""The table of tools that a run can report to, each by its own library."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_jax.training import log
from lora_jax.training.errors import TrainingError


class Reporter(Protocol):
    """Takes the numbers of a run as they come."""

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step, or of an evaluation after it."""

    def close(self) -> None:
        """Write what is left."""


class _Metrics:
    """`metrics.jsonl`: one line per step or evaluation, with the names of the other tools."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], done: int) -> None:
        self._path = directory / "metrics.jsonl"
        log.rewind(self._path, done)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        log.append(self._path, {"step": step, **numbers})

    def close(self) -> None:
        pass


class _TensorBoard:
    """Event files in `tensorboard/`; a resumed run hides what it takes again."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], done: int) -> None:
        from tensorboardX import SummaryWriter

        again = done + 1 if done else None
        folder, end = str(directory / "tensorboard"), f".after-{done}"
        self._writer = SummaryWriter(folder, purge_step=again, filename_suffix=end)
        if not done:
            self._writer.add_text("settings", f"```\n{json.dumps(dict(settings), indent=1)}\n```")

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, whose id is that of the directory, so that it is resumed."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], done: int) -> None:
        import wandb

        path = os.path.abspath(directory)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lora-jax"),
            name=directory.name,
            id=hashlib.sha256(path.encode()).hexdigest()[:16],
            resume="allow" if done else "never",
            reinit="create_new",  # beside other runs of a sweep
            dir=path,
            config=dict(settings),
            settings=wandb.Settings(console="off"),
        )

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Kind:
    """A tool.

    Attributes:
      open: `(directory of the run, its settings, steps done before) -> reporter`.
      package: what it needs to be installed, if anything.
      extra: the extra of lora-jax that installs it.
    """

    open: Callable[[Path, Mapping[str, Any], int], Reporter]
    package: str = ""
    extra: str = ""


KINDS: Mapping[str, Kind] = {
    "jsonl": Kind(_Metrics),
    "tensorboard": Kind(_TensorBoard, "tensorboardX", "tensorboard"),
    "wandb": Kind(_WandB, "wandb", "wandb"),
}


def require(name: str) -> None:
    """Import the library of a tool, before a run begins.

    Raises:
      TrainingError: it is not installed; the message says how to install it.
    """
    kind = KINDS[name]
    if not kind.package:
        return
    try:
        __import__(kind.package)
    except ImportError:
        raise TrainingError(
            f"--report {name} needs the package {kind.package}; pip install "
            f"'lora-jax[{kind.extra}]'"
        ) from None
