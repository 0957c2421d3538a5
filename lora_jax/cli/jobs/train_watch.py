"""What a running `lora-jax train` shows and saves, and what ends it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Self

from rich.console import Console

from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.cli.jobs.train_results import Results
from lora_jax.core.foreign import escaped
from lora_jax.core.signals import Interrupt, watched
from lora_jax.files.disk import processes
from lora_jax.training import log, progress, run_record
from lora_jax.training.loop import Watcher
from lora_jax.training.optimizer import Optimizer


class Watch:
    """The terminal, the signals and the adapter files of a run.

    Args:
      results: how adapters are written.
      steps: of the whole run.
      optimizer: its learning rates are described when a run is resumed.
      record: what `run.json` is to say from the first step on.
      command: the command that would resume the run.
      console: where progress is drawn or printed.
    """

    def __init__(
        self,
        results: Results,
        steps: int,
        optimizer: Optimizer,
        record: Mapping[str, Any],
        command: str,
        console: Console,
    ) -> None:
        self._results, self._steps, self._optimizer = results, steps, optimizer
        self._record, self._command, self._console = record, command, console
        self._saved = 0  # the step of the last checkpoint
        self._interrupt = Interrupt()
        self._show: Callable[[log.Record], None] = lambda record: None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._interrupt = self._open.enter_context(watched(self._ask, self._end))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show the steps: as a bar in a terminal, else as lines."""
        if self._console.is_terminal:
            with progress.bar(self._console, self._steps) as self._show:
                yield
        else:
            every = self._results.options.log_every
            self._show = progress.lines(self._say, self._steps, every)
            yield

    @property
    def watcher(self) -> Watcher:
        """The callbacks for the loop."""
        best = lambda adapters, record: self._results.write("best", adapters, record)
        return Watcher(self._interrupt, self._step, best, self._start, self._save, self._say)

    def describe_interruption(self, step: int) -> str:
        """Return what an interrupted run leaves, and how to resume it."""
        place = f", with its adapter in {self._results.path('adapter')}" if step else ""
        return f"step {step} of {self._steps} is saved{place}; to resume: {self._command}"

    def _say(self, text: str) -> None:
        self._console.print(escaped(text), markup=False, soft_wrap=True)

    def _start(self, done: int) -> None:
        """Say from where the run continues, and with which learning rate."""
        self._saved = done
        out = self._results.options.out
        before = run_record.recorded(out, "steps")
        if done == before == self._steps:
            self._say(f"all {done} steps are done already; --steps N continues the run to step N")
        elif done:
            self._say(f"resuming after step {done} of {before}")
        if before != self._steps:
            self._say(
                f"the run now has {self._steps} steps: "
                f"{self._optimizer.describe(self._steps, done)}"
            )
            if processes.is_first():
                run_record.write(out, self._record)
        if done < self._steps and self._console.is_terminal:
            self._say("compiling the first step, which may take minutes")

    def _step(self, record: log.Record) -> None:
        self._show(record)
        if "eval_loss" in record:
            self._say(f"step {record['step']}, {progress.describe(record)}")

    def _save(self, adapters: Any, step: int) -> None:
        self._saved = step
        if step:
            self._results.write("adapter", adapters, {"step": step})

    def _ask(self) -> None:
        self._say("finishing the steps under way, then saving; Ctrl-C again stops at once")

    def _end(self) -> NoReturn:
        """End the process here: an exception in the main thread would crash XLA's compiler."""
        if self._console.is_terminal:
            self._console.show_cursor(True)
        what = (
            f"step {self._saved} of {self._steps} is saved" if self._saved else "no step is saved"
        )
        print(
            f"error: interrupted at once: {what}; to resume: {self._command}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(INTERRUPTED)
