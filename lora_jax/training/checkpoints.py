"""Checkpoints of a run, written by Orbax: adapters, optimizer state and step, whole or absent."""

import shutil
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from lora_jax.training.errors import TrainingError

_DELETED = ".deleted"  # old steps are renamed into it, so that none is ever there in part


class Checkpoints:
    """The last checkpoints in a directory, by step.

    Args:
      directory: created if missing.
      keep: how many to keep; an older one is there in case the last one is damaged.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        # The next step donates the state, so it is saved before: writing in the background would
        # gain nothing.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,
        )
        self._empty()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Write `state`, a pytree of arrays, unless there is a checkpoint of that step.

        Raises:
          TrainingError: the disk is full, or the directory cannot be written to.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except OSError as error:
            raise TrainingError(
                f"{self.directory}: cannot write the checkpoint of step {step} ({error}). Free "
                "some disk space, then continue with --resume"
            ) from error
        self._empty()

    def _empty(self) -> None:
        """Delete the old steps that were put aside. After a kill the next process does it."""
        shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Return the last readable checkpoint with its step, or None without any checkpoint.

        Args:
          like: a pytree of arrays or `ShapeDtypeStruct`s with the structure of the state.

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
                f"{self.directory}: cannot read any checkpoint ({str(failure).splitlines()[0]}). "
                "Start again with another --out"
            ) from failure
        return None


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
