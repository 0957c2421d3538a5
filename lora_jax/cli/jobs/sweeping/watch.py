"""What a running `lora-jax sweep` shows and saves, and what ends it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from lora_jax.cli.interruptible import Interruptible
from lora_jax.cli.jobs.sweeping.reports import SweepReports
from lora_jax.cli.jobs.sweeping.results import SweepResults
from lora_jax.training import log
from lora_jax.training.sweeping import progress
from lora_jax.training.sweeping.comparison import DIVERGED
from lora_jax.training.sweeping.course import Course
from lora_jax.training.sweeping.loop import SweepWatcher


class Watch(Interruptible):
    """The terminal, the signals and the adapter files of a sweep.

    Args:
      results: how adapters are written.
      steps: of each run.
      total: of the whole sweep, if they are known.
      command: the command that would resume the sweep.
      console: where progress is drawn or printed.
      reports: the tools that get what is measured.
    """

    def __init__(
        self,
        results: SweepResults,
        steps: int,
        total: int | None,
        command: str,
        console: Console,
        reports: SweepReports,
    ) -> None:
        super().__init__(command, console)
        self._reports = reports
        self._results, self._steps, self._total = results, steps, total
        self._names = [*results.settings]
        self._saved = 0  # the step of the last checkpoint
        self._show: progress.Show = lambda records: None

    def __exit__(self, *_: object) -> None:
        self._reports.close()
        super().__exit__(*_)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show the steps: as bars in a terminal, else as lines."""
        if self.console.is_terminal:
            more = (len(self._names), self._steps, self._total)
            with progress.bars(self.console, *more) as self._show:
                yield
        else:
            every = self._results.options.log_every
            self._show = progress.lines(self.say, self._total, every)
            yield

    @property
    def watcher(self) -> SweepWatcher:
        """The callbacks for the loop."""
        return SweepWatcher(self.interrupt, self._step, self._start, self._end_run, self._save)

    def describe_saved(self) -> str:
        """Return in words what is saved at this moment."""
        return f"step {self._saved} is saved" if self._saved else "no step is saved"

    def describe_interruption(self) -> str:
        """Return what an interrupted sweep leaves, and how to resume it."""
        return f"{self.describe_saved()}, with the adapters so far; to resume: {self.command}"

    def _start(self, done: int, course: Course) -> None:
        self._saved = done
        self._reports.start(log.read_until(self._results.options.out / "log.jsonl", done))
        if course.is_over:
            self.say("all runs are done already")
        elif done:
            self.say(f"resuming after step {done}")
        if not course.is_over and self.console.is_terminal:
            self.say("compiling the first step, which may take minutes")

    def _step(self, records: Sequence[log.Record]) -> None:
        self._show(records)
        self._reports.report(records)

    def _end_run(self, run: int, how: str, adapters: Any) -> None:
        if how != DIVERGED:
            self._results.write(self._names[run], adapters)

    def _save(self, step: int, adapters: Mapping[int, Any]) -> None:
        self._saved = step
        for run, one in adapters.items():
            self._results.write(self._names[run], one)
