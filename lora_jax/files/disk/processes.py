"""Several processes as one program: values on every host, files written by the first process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax.core.errors import OtherProcessError

_BYTES = 2048  # of a message that processes tell one another
_TOLD = "All processes of this program know of this error."


def span_processes(*trees: Any) -> bool:
    """Return whether an array of these trees lies on devices of more than this process."""
    return any(_spans(x) for x in jax.tree.leaves(trees))


def _spans(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def is_first() -> bool:
    """Return whether this is process 0, or the only one."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Return a tree's arrays as numpy arrays, whole in every process.

    Where one spans processes, all processes call this together with the same tree. Arrays are
    gathered one after another, so the devices hold one whole array at a time.
    """
    return jax.tree.map(_gather, tree)


def _gather(x: Any) -> Any:
    if not _spans(x):
        return jax.device_get(x)
    if x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def to_first(tree: Any) -> Any:
    """Return a tree's arrays as numpy arrays in process 0, as `ShapeDtypeStruct`s in the others.

    All processes call this together if an array spans processes. A process other than the first
    holds one whole array at a time.
    """

    def one(x: Any) -> Any:
        value = _gather(x)
        return value if is_first() else jax.ShapeDtypeStruct(value.shape, value.dtype)

    return jax.tree.map(one, tree)


def tell_all(text: str) -> list[str]:
    """Return what each process says, in their order; all processes call this together.

    >>> tell_all("done")
    ['done']
    """
    data = text.encode()[:_BYTES]
    said = np.zeros(_BYTES, np.uint8)
    said[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(said)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def together(
    do: Callable[[], Any],
    *,
    several: bool = True,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Any:
    """Do something in every process, and go on only if none of them failed.

    Args:
      do: what may fail in one process alone. It must not wait for other processes, except for
        those that fail in the same way.
      several: whether the other processes call this too.
      errors: those that the others are told, unless they are already; any other is raised at once.

    Returns:
      What `do` returns here.

    Raises:
      OtherProcessError: it failed in another process; the message is that of the first one.
      Exception: what `do` raises here, if this process is the first one that failed.

    >>> together(lambda: 1 + 1)
    2
    """
    if not several or jax.process_count() == 1:
        return do()
    result, failure = None, None
    try:
        result = do()
    except Exception as error:
        if is_told(error) or not isinstance(error, errors):
            raise
        failure = error
    said = tell_all("" if failure is None else explain(failure))
    first = next((number for number, text in enumerate(said) if text), None)
    if failure is not None and first == jax.process_index():
        failure.add_note(_TOLD)
        raise failure
    if first is not None:
        raise OtherProcessError(first, said[first]) from failure
    return result


def by_first(write: Callable[[], object], *, several: bool = True) -> None:
    """Do something in process 0 while the others wait for it.

    Args:
      write: what writes files.
      several: whether the other processes call this too; if not, this one writes.

    Raises:
      OtherProcessError: in the others, if it failed in process 0; the message is the one there.
      Exception: in process 0, what `write` raises.
    """
    together(lambda: write() if not several or is_first() else None, several=several)


def is_told(error: BaseException) -> bool:
    """Return whether all processes know of an error, so that they end together."""
    return isinstance(error, OtherProcessError) or _TOLD in getattr(error, "__notes__", ())


def explain(error: BaseException) -> str:
    """Return an error in words, never empty."""
    if isinstance(error, OSError) and error.strerror:
        place = error.filename2 or error.filename
        return error.strerror if place is None else f"{place}: {error.strerror}"
    return str(error) or type(error).__name__
