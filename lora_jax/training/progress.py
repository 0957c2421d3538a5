"""A progress bar of a run, on the terminal alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.training.log import Record


@contextmanager
def bar(console: Console, steps: int, done: int = 0) -> Iterator[Callable[[Record], None]]:
    """A bar for training; the function it gives takes the records of the log as they come.

    Args:
      console: where it is drawn; nothing is where that is no terminal.
      steps: of the whole run.
      done: steps of earlier runs.
    """
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[held_out]}"),
    )
    losses: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=steps, completed=done, loss="", held_out="")

        def told(record: Record) -> None:
            if "loss" in record:
                losses.append(record["loss"])
                shown = f"loss {np.mean(losses[-10:]):.3f}, {record['seconds']:.2f} s a step"
                progress.update(task, completed=record["step"], loss=shown)
            else:
                progress.update(task, held_out=describe(record))

        yield told


def describe(record: Record) -> str:
    """An evaluation in words.

    >>> describe({"step": 3, "eval_loss": 2.0, "perplexity": 7.389})
    'held out: perplexity 7.39'
    """
    if "eval_accuracy" in record:
        return f"held out: accuracy {record['eval_accuracy']:.1%}, loss {record['eval_loss']:.3f}"
    return f"held out: perplexity {record['perplexity']:.2f}"
