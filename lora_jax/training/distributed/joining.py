"""Join the processes of a run into one JAX program."""

import jax

from lora_jax.core.foreign import shown
from lora_jax.training.errors import TrainingError

#: Seconds that a process waits at its end for the others, and for all of them to begin.
_SHUTDOWN, _BEGIN = 30, 300
_ALONE = "should be defined"  # what JAX says where it finds no cluster
_IN_USE = "must be called before"  # a program that uses JAX already has joined, or is alone


def join_processes(coordinator: str, processes: int, process_id: int) -> None:
    """Join the processes of a run, of which this is one; before JAX is used for anything else.

    Args:
      coordinator: address of process 0, "host:port".
      processes: how many there are.
      process_id: number of this one.

    Raises:
      TrainingError: they do not all begin within five minutes, or the address cannot be used.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=_BEGIN,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"--coordinator {shown(coordinator)}: the {processes} processes cannot be joined "
            f"({shown(str(error).splitlines()[0])}); give each its own --process-id, and the "
            "address of process 0, with a free port, to all"
        ) from None


def join_cluster() -> None:
    """Join the processes of a job that JAX knows by itself, as under Slurm, if this is in one.

    Raises:
      TrainingError: they do not all begin within five minutes.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            initialization_timeout=_BEGIN, shutdown_timeout_seconds=_SHUTDOWN
        )
    except ValueError as error:
        if _ALONE not in str(error):
            raise TrainingError(f"--mesh: {shown(str(error))}") from None
    except RuntimeError as error:
        if _IN_USE in str(error):
            return
        raise TrainingError(
            f"--mesh: the processes of this job cannot be joined ({shown(str(error))}); "
            "--coordinator, --processes and --process-id say where they are"
        ) from None
