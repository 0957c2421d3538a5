"""What a failure means in one of several processes of a run: who says it, and who waits."""

import os
import re
import sys

#: What collectives and JAX's coordination service say when a process is gone.
_LOST = re.compile(
    r"Gloo|NCCL|coordination service|heartbeat|Connection (reset|closed|refused)|Socket closed",
    re.IGNORECASE,
)


def are_there() -> bool:
    """Return whether this is one of several processes of a run."""
    jax = sys.modules.get("jax")  # without it no run has started
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is process 0, or the only one, which says what all know."""
    return not are_there() or sys.modules["jax"].process_index() == 0


def know(error: BaseException) -> bool:
    """Return whether all processes know of an error."""
    from lora_jax.files.disk.processes import is_told

    return is_told(error)


def leave(error: BaseException, status: int) -> None:
    """End this process at once if the others do not know why, because they would wait for it."""
    if are_there() and not know(error) and not isinstance(error, KeyboardInterrupt):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def explain_loss(error: BaseException) -> str | None:
    """Return what to say of an error that comes from the end of another process; else None."""
    if not are_there() or not _LOST.search(str(error)):
        return None
    what = str(error).partition("\n")[0]
    return (
        "another process of the run has ended, or cannot be reached; its own output says why, and "
        f"--resume continues from the last checkpoint ({what})"
    )
