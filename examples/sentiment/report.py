"""What a person sees of a run: progress, phases and their seconds, a loss curve, a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Item = TypeVar("Item")


class Report:
    """Collects the seconds of each phase and the files written, and shows progress meanwhile."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.files: list[Path] = []

    def say(self, text: str) -> None:
        """Prints text as it is, whatever brackets are in it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds that its block takes to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

    def wrote(self, path: Path) -> None:
        """Notes a file for the table."""
        self.files.append(path)

    def watch(self, name: str) -> Callable[[Iterable[Item], int], Iterator[Item]]:
        """A wrapper for an iterable of known length, which shows a progress bar for it."""

        def bar(items: Iterable[Item], total: int) -> Iterator[Item]:
            with self._progress() as progress:
                yield from progress.track(items, total=total, description=name)

        return bar

    @contextmanager
    def loss_bar(self, steps: int) -> Iterator[Callable[[float], None]]:
        """A progress bar for training; the function it gives takes the loss after each step."""
        with self._progress(TextColumn("{task.fields[loss]}")) as progress:
            task = progress.add_task("train", total=steps, loss="")
            smooth: list[float] = []

            def advance(loss: float) -> None:
                smooth.append(loss)
                progress.update(task, advance=1, loss=f"loss {np.mean(smooth[-10:]):.3f}")

            yield advance

    def _progress(self, *columns: TextColumn) -> Progress:
        return Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            *columns,
            console=self.console,
        )

    def loss_curve(self, losses: Sequence[float], path: Path, window: int = 20) -> None:
        """Draws `losses` `[steps]` and their mean over the last `window` steps into a picture."""
        # A bare Figure draws without pyplot, hence without a display or global state.
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        means = [np.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps, losses, color="0.75", label="each step")
        axes.plot(steps, means, color="C0", label=f"mean of {window} steps")
        axes.set(xlabel="step", ylabel="training loss")
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        self.wrote(path)

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Prints `rows`, then the seconds by phase with their total, then the files written."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f} s")
        table.add_row("total", f"{sum(self.seconds.values()):.1f} s")
        self.console.print(table)
        for file in self.files:
            self.say(f"wrote {file}")
