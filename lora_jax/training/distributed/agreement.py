"""What all processes of a run decide together between steps: to stop, or to fail."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.files.disk import processes

_GO_ON, _STOP, _FAILED = 0, 1, 2
_LATE = 2  # calls before the answer to one is read, so that no process waits for another


class Agreement:
    """Whether to stop, the same answer in every process.

    Each call asks all processes, and returns the answer to the question of some calls before,
    which needs no waiting. So all must call it equally often, between the same steps.

    Args:
      stop: whether this process wants to stop.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop, self._is_over = stop, False
        self._failure: Exception | None = None
        self._waiting: deque[jax.Array] = deque()
        devices = np.array(jax.devices())
        mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(AxisType.Auto,))
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        whole = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(lambda x: x.max(), out_shardings=whole)

    def fail(self, error: Exception) -> None:
        """Make all processes fail at the same call, this one with `error`."""
        self._failure = self._failure or error

    def __call__(self) -> bool:
        """Return whether to stop.

        Raises:
          OtherProcessError: another process failed.
          Exception: what `fail` was given.
        """
        if self._is_over:
            return True
        mine = _FAILED if self._failure else _STOP if self._stop() else _GO_ON
        flags = np.full(self._each.mesh.size, mine, np.int32)
        asked = jax.make_array_from_callback(flags.shape, self._each, partial(_part, flags))
        self._waiting.append(self._largest(asked))
        if len(self._waiting) <= _LATE:
            return False
        answer = int(self._waiting.popleft())
        self._is_over = answer != _GO_ON
        if answer == _FAILED:
            self.finish()
        return self._is_over

    def finish(self) -> None:
        """Fail if a process has failed; this waits for all processes.

        Raises:
          OtherProcessError, Exception: as a call.
        """
        failure, self._failure = self._failure, None

        def raise_own() -> None:
            if failure is not None:
                raise failure

        processes.together(raise_own)


def _part(flags: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return flags[index]


@contextlib.contextmanager
def agreeing(
    stop: Callable[[], bool], *, several: bool = True
) -> Iterator[tuple[Callable[[], bool], Callable[[Exception], None] | None]]:
    """Yield `stop` as all processes agree on it, and what makes all of them fail.

    In a program of one process, or with `several` false, these are `stop` itself and None.
    """
    if not several or jax.process_count() == 1:
        yield stop, None
        return
    agreement = Agreement(stop)
    yield agreement, agreement.fail
    agreement.finish()
