"""What a run writes while it goes: its log and its checkpoints."""

from pathlib import Path
from typing import Any

from lora_jax.training import log


class RunFiles:
    """The log and the checkpoints of one run.

    Args:
      directory: for `log.jsonl` and `checkpoints/`, created if missing. With None nothing is
        written, and the log is in memory only.
    """

    def __init__(self, directory: Path | None) -> None:
        self.records: list[dict[str, Any]] = []
        self.checkpoints = None
        if directory is not None:
            # Orbax takes a second to import.
            from lora_jax.training.checkpoints import Checkpoints

            directory.mkdir(parents=True, exist_ok=True)
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
        """
        if self.checkpoints is None:
            return 0, start
        done, state = self.checkpoints.restore(start) or (0, start)
        self.records = log.rewind(self._log, done)
        return done, state

    def note(self, record: dict[str, Any]) -> None:
        """Append a record to the log."""
        if self.checkpoints is not None:
            log.append(self._log, record)
        self.records.append(record)

    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint, unless there is one of that step."""
        if self.checkpoints is not None:
            self.checkpoints.save(step, state)
