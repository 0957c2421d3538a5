"""Checkpoints of a run, written by Orbax: adapters, optimizer state and step, whole or absent."""

import errno
import os
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.core.foreign import shown
from lora_jax.files.disk import processes
from lora_jax.files.disk.quiet_orbax import quiet_orbax
from lora_jax.training import checkpoint_steps
from lora_jax.training.errors import TrainingError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "quota exceeded", "File too large")  # as C++ libraries say it
_OVERHEAD = 1 << 20  # bytes of a checkpoint beside its arrays
_UNFINISHED = "*.orbax-checkpoint-tmp"
_DELETED = ".deleted"  # old steps are renamed into it, so that none is ever there in part


class Checkpoints:
    """The last checkpoints in a directory, by step.

    In a program of several processes all of them make one, and call its methods together; each
    writes its shards, so the directory must be one that all of them see.

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
        damaged = checkpoint_steps.damaged(self.directory)
        processes.together(lambda: None)  # all have looked before one of them moves it
        for name, problem in damaged.items():
            self._move_away(name, problem)
        self._manager = self._open(options)

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Open the directory, without the steps that Orbax cannot open."""
        try:
            with quiet_orbax():
                return ocp.CheckpointManager(self.directory, options=options)
        except Exception:  # whatever Orbax meets in the metadata of one of the steps
            for name in checkpoint_steps.steps_in(self.directory):
                problem = _open_alone(self.directory / name)
                if problem:
                    self._move_away(name, problem)
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:
            raise TrainingError(f"{self.directory}: cannot be opened ({shown(error)})") from error

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
        processes.together(lambda: self._reserve(sum(map(_bytes_here, jax.tree.leaves(state)))))

    def _reserve(self, arrays: int) -> None:
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
        processes.together(lambda: self._save(step, jax.tree.map(_on_all_processes, state)))
        self._empty()

    def _save(self, step: int, state: Any) -> None:
        metadata = {checkpoint_steps.STEP: step}
        try:
            with quiet_orbax():
                self._manager.save(
                    step, args=ocp.args.StandardSave(state), force=True, custom_metadata=metadata
                )
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises the last two
            for unfinished in self.directory.glob(_UNFINISHED):
                shutil.rmtree(unfinished, ignore_errors=True)
            message = self._explain(error, f"the checkpoint of step {step}")
            raise TrainingError(message) from error

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
        if processes.is_first():
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Return the last readable checkpoint with its step, or None without any checkpoint.

        Later ones that cannot be read are moved to `unreadable/`, and a warning names them: they
        would stand in the way of the checkpoints to come.

        Args:
          like: a pytree of arrays or `ShapeDtypeStruct`s with the structure of the state.

        Raises:
          TrainingError: there are checkpoints, and none of them can be read.
        """
        target = jax.tree.map(_abstract, like)
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = processes.together(partial(self._restore, step, target))
            except Exception as error:  # whatever Orbax meets in a damaged file
                failures[step] = " ".join(str(error).split()) or type(error).__name__
            else:
                for later, problem in failures.items():
                    self._move_away(str(later), problem)
                if failures:
                    self._manager.reload()
                return step, jax.tree.map(_placed_like, found, like)
        why = [shown(problem) for problem in failures.values()]
        why += [f"unreadable/{shown(x)}" for x in checkpoint_steps.moved_away(self.directory)]
        if why:
            raise TrainingError(
                f"{self.directory}: cannot read any checkpoint ({why[0]}). Start again with "
                "another --out"
            )
        return None

    def _restore(self, step: int, target: Any) -> Any:
        with quiet_orbax():
            found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        _check_like(found, target)
        return found

    def _move_away(self, name: str, problem: str) -> None:
        """Move a directory that cannot be read, and say so."""
        place = self.directory / name

        def move() -> None:
            nonlocal place
            place = checkpoint_steps.move_away(self.directory, name)

        processes.by_first(move)
        warnings.warn(
            f"{self.directory}: the checkpoint {shown(name)} cannot be read ({shown(problem)}); "
            f"it was moved to {checkpoint_steps.UNREADABLE}/{shown(place.name)}",
            stacklevel=3,
        )


def _open_alone(step: Path) -> str:
    """Return what Orbax says about the directory of one step; empty if it can open it."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / step.name).symlink_to(step, target_is_directory=True)
        try:
            ocp.CheckpointManager(folder, options=options).close()
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__
    return ""


def _check_like(found: Any, target: Any) -> None:
    """Raise `ValueError` where an array has another shape or dtype than the state's."""
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), found, target)
    if not all(jax.tree.leaves(same)):
        raise ValueError("an array has another shape or dtype")


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = _everywhere() if _is_local(x) else getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _is_local(x: Any) -> bool:
    """Return whether an array lies in this process alone, which Orbax saves only if it is alone."""
    return isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1


def _everywhere() -> NamedSharding:
    """Return the sharding of arrays that every device of every process has whole."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def _on_all_processes(x: Any) -> Any:
    """Return an array as Orbax saves it; one that lies in one process is the same in all."""
    if not _is_local(x):
        return x
    value = jax.device_get(x)
    return jax.make_array_from_callback(x.shape, _everywhere(), lambda index: value[index])


def _placed_like(found: Any, like: Any) -> Any:
    """Return an array that was read where `like` is."""
    if not _is_local(like):
        return found
    return jax.device_put(np.asarray(found), like.sharding)


def _bytes_here(x: Any) -> int:
    """Return how many bytes of an array this process writes."""
    if not isinstance(x, jax.Array):
        return x.nbytes
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.replica_id == 0)
