"""What a running `lora-jax train` shows and saves, and what ends it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console

from lora_jax.cli.interruptible import Interruptible
from lora_jax.cli.jobs.training.reports import Reports
from lora_jax.cli.jobs.training.results import Results
from lora_jax.files.disk import processes
from lora_jax.training import log, progress, run_record
from lora_jax.training.loop import Watcher
from lora_jax.training.optimizer import Optimizer


class Watch(Interruptible):
    """The terminal, the signals and the adapter files of a run.

    Args:
      results: how adapters are written.
      steps: of the whole run.
      optimizer: its learning rates are described when a run is resumed.
      record: what `run.json` is to say from the first step on.
      command: the command that would resume the run.
      console: where progress is drawn or printed.
      reports: the tools that get what is measured.
    """

    def __init__(
        self,
        results: Results,
        steps: int,
        optimizer: Optimizer,
        record: Mapping[str, Any],
        command: str,
        console: Console,
        reports: Reports,
    ) -> None:
        super().__init__(command, console)
        self._reports = reports
        self._results, self._steps, self._optimizer = results, steps, optimizer
        self._record = record
        self._saved = 0  # the step of the last checkpoint
        self._show: Callable[[log.Record], None] = lambda record: None

    def __exit__(self, *_: object) -> None:
        self._reports.close()
        super().__exit__(*_)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show the steps: as a bar in a terminal, else as lines."""
        if self.console.is_terminal:
            with progress.bar(self.console, self._steps) as self._show:
                yield
        else:
            every = self._results.options.log_every
            self._show = progress.lines(self.say, self._steps, every)
            yield

    @property
    def watcher(self) -> Watcher:
        """The callbacks for the loop."""
        best = lambda adapters, record: self._results.write("best", adapters, record)
        return Watcher(self.interrupt, self._step, best, self._start, self._save, self.say)

    def describe_saved(self) -> str:
        """Return in words what is saved at this moment."""
        if not self._saved:
            return "no step is saved"
        return f"step {self._saved} of {self._steps} is saved"

    def describe_interruption(self, step: int) -> str:
        """Return what an interrupted run leaves, and how to resume it."""
        place = (
            f", with its {self._results.what} in {self._results.path('adapter')}" if step else ""
        )
        return f"step {step} of {self._steps} is saved{place}; to resume: {self.command}"

    def _start(self, done: int) -> None:
        """Say from where the run continues, and with which learning rate."""
        self._saved = done
        self._reports.start(done)
        out = self._results.options.out
        before = run_record.recorded(out, "steps")
        if done == before == self._steps:
            self.say(f"all {done} steps are done already; --steps N continues the run to step N")
        elif done:
            self.say(f"resuming after step {done} of {before}")
        if before != self._steps:
            self.say(
                f"the run now has {self._steps} steps: "
                f"{self._optimizer.describe(self._steps, done)}"
            )
            if processes.is_first():
                run_record.write(out, self._record)
        if done < self._steps and self.console.is_terminal:
            self.say("compiling the first step, which may take minutes")

    def _step(self, record: log.Record) -> None:
        self._show(record)
        self._reports.report(record)
        if "eval_loss" in record:
            self.say(f"step {record['step']}, {progress.describe(record)}")

    def _save(self, adapters: Any, step: int) -> None:
        self._saved = step
        if step:
            self._results.write("adapter", adapters, {"step": step})
