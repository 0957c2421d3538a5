"""Checkpoints of a run by Orbax: adapters, optimizer state and step, whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.training.errors import TrainingError

_DELETED = ".deleted"  # where old steps go by one rename, so that none is ever there in part


class Checkpoints:
    """The last checkpoints in a directory, by step.

    Args:
      directory: made if need be.
      keep: how many to keep; the one before the last is there in case the last one is damaged.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        # Saved before the next step gives the state's memory away: there is nothing to gain by
        # writing in the background.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,
        )
        self._empty()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory."""
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that are there whole, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Writes `state`, a pytree of arrays, unless that step is there already.

        Raises:
          TrainingError: the disk is full, or the directory cannot be written to.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except OSError as error:
            raise TrainingError(
                f"{self.directory}: the checkpoint of step {step} cannot be written ({error}); "
                "make room and go on with --resume"
            ) from error
        self._empty()

    def _empty(self) -> None:
        """Deletes what was put aside; after a kill the next process does."""
        shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The last checkpoint that can be read, and its step; None if there is none at all.

        Args:
          like: a pytree of arrays or `ShapeDtypeStruct`s of the state's structure.

        Raises:
          TrainingError: there are checkpoints, and none of them can be read.
        """
        target = jax.tree.map(_abstract, like)
        failure: Exception | None = None
        for step in reversed(self.steps()):
            try:
                found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            except (OSError, ValueError, KeyError, TypeError) as error:
                failure = error
            else:
                return step, found
        if failure is not None:
            raise TrainingError(
                f"{self.directory}: no checkpoint can be read ({str(failure).splitlines()[0]}); "
                "start anew in another --out"
            ) from failure
        return None


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
