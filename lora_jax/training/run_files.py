"""What a run writes while it goes: its log and its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax import SweepState
from lora_jax.files.disk import processes
from lora_jax.training import log
from lora_jax.training.step import State


class RunFiles:
    """The log and the checkpoints of one run.

    Args:
      directory: for `log.jsonl` and `checkpoints/`, created if missing. With None nothing is
        written, and the log is in memory only.
      saved: called with the adapters and the step after each checkpoint.
      fail: called with what keeps process 0 from writing the log, in a run of several processes,
        where it must not stop without the others.

    All processes of a run have one of these; process 0 alone writes the log.
    """

    def __init__(
        self,
        directory: Path | None,
        saved: Callable[[Any, int], None] = lambda adapters, step: None,
        fail: Callable[[Exception], None] | None = None,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._report_saved, self._last_saved, self._fail = saved, -1, fail
        self.checkpoints = None
        if directory is not None:
            # Orbax takes a second to import.
            from lora_jax.training.checkpoints import Checkpoints

            processes.by_first(lambda: directory.mkdir(parents=True, exist_ok=True))
            self._log = directory / "log.jsonl"
            self.checkpoints = Checkpoints(directory / "checkpoints")

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()

    def resume(self, start: Any) -> tuple[int, Any]:
        """Return the step and the state of the last checkpoint, or 0 and `start` without one.

        The log is rewound to that step.

        Raises:
          TrainingError: no checkpoint can be read, or none can be written.
        """
        if self.checkpoints is None:
            return 0, start
        done, state = self.checkpoints.restore(start) or (0, start)
        self.checkpoints.reserve(state)
        self.records = log.read_until(self._log, done)
        processes.by_first(lambda: log.rewind(self._log, done))
        return done, state

    def note(self, record: dict[str, Any]) -> None:
        """Append a record to the log."""
        if self.checkpoints is not None and processes.is_first():
            self._append(record)
        self.records.append(record)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            log.append(self._log, record)
        except OSError as error:
            if self._fail is None:
                raise
            self._fail(error)

    def save(self, step: int, state: State | SweepState) -> None:
        """Write a checkpoint, unless there is one of that step."""
        if self.checkpoints is not None and step != self._last_saved:
            self.checkpoints.save(step, state)
            self._last_saved = step
            self._report_saved(state.adapters, step)
