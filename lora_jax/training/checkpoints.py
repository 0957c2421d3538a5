"""Checkpoints of a run, written by Orbax: adapters, optimizer state and step, whole or absent."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from lora_jax.core.foreign import shown
from lora_jax.training.errors import TrainingError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "quota exceeded", "File too large")  # as C++ libraries say it
_OVERHEAD = 1 << 20  # bytes of a checkpoint beside its arrays
_UNFINISHED = "*.orbax-checkpoint-tmp"
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

    def reserve(self, state: Any) -> None:
        """Check that a checkpoint of `state` fits on the disk; nothing stays written.

        Raises:
          TrainingError: it does not, or the directory cannot be written to.
        """
        arrays = sum(x.nbytes for x in jax.tree.leaves(state))
        size = arrays + arrays // 4 + _OVERHEAD
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise TrainingError(self._explain(error, f"a checkpoint of {size:,} bytes")) from error

    def save(self, step: int, state: Any) -> None:
        """Write `state`, a pytree of arrays, unless there is a checkpoint of that step.

        Raises:
          TrainingError: the disk is full, or the directory cannot be written to.
        """
        if step in self._manager.all_steps():
            return
        self.reserve(state)
        try:
            with _quiet():
                self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises the last two
            for unfinished in self.directory.glob(_UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)
            message = self._explain(error, f"the checkpoint of step {step}")
            raise TrainingError(message) from error
        self._empty()

    def _explain(self, error: Exception, what: str) -> str:
        """Return one line for a failure to write, without the words of other libraries."""
        is_full = getattr(error, "errno", None) in _FULL or any(
            word in str(error) for word in _FULL_WORDS
        )
        reason = "the disk is full" if is_full else shown(str(error).partition("\n")[0])
        mend = "Free some disk space" if is_full else "Make the directory writable"
        return (
            f"{self.directory}: cannot write {what} ({reason}). {mend}, then continue with --resume"
        )

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
                with _quiet():
                    found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            except (OSError, ValueError, KeyError, TypeError) as error:
                failure = error
            else:
                return step, found
        if failure is not None:
            raise TrainingError(
                f"{self.directory}: cannot read any checkpoint "
                f"({shown(str(failure).partition(chr(10))[0])}). "
                "Start again with another --out"
            ) from failure
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracebacks off stderr that Orbax's threads print before the exception is raised."""
    logger, hook = logging.getLogger("absl"), sys.excepthook
    before = logger.disabled
    logger.disabled, sys.excepthook = True, lambda *_: None
    try:
        yield
    finally:
        logger.disabled, sys.excepthook = before, hook


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
