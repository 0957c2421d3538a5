"""Progress bars, on the terminal alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lora_jax.training.log import Record

Item = TypeVar("Item")


@contextmanager
def bar(console: Console, steps: int, done: int = 0) -> Iterator[Callable[[Record], None]]:
    """Show a bar for training; the function that it yields takes the log's records as they come.

    Args:
      console: where it is drawn, if that is a terminal.
      steps: number of steps in the whole run.
      done: steps of earlier runs.
    """
    more = (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[held_out]}"))
    losses: list[float] = []
    with _progress(console, *more) as progress:
        task = progress.add_task("train", total=steps, completed=done, loss="", held_out="")

        def show(record: Record) -> None:
            if "loss" in record:
                losses.append(record["loss"])
                shown = f"loss {np.mean(losses[-10:]):.3f}, {record['seconds']:.2f} s per step"
                progress.update(task, completed=record["step"], loss=shown)
            else:
                progress.update(task, held_out=describe(record))

        yield show


def track(console: Console, name: str) -> Callable[[Iterable[Item], int], Iterator[Item]]:
    """Return a wrapper for an iterable of known length, which shows a bar while it is consumed.

    >>> list(track(Console(), "count")([1, 2, 3], 3))
    [1, 2, 3]
    """

    def wrap(items: Iterable[Item], total: int) -> Iterator[Item]:
        with _progress(console) as progress:
            yield from progress.track(items, total=total, description=name)

    return wrap


def _progress(console: Console, *more: ProgressColumn) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, *more, console=console, disable=not console.is_terminal)


def describe(record: Record) -> str:
    """Return an evaluation in words.

    >>> describe({"step": 3, "eval_loss": 2.0, "perplexity": 7.389})
    'held out: perplexity 7.39'
    """
    if "eval_accuracy" in record:
        return f"held out: accuracy {record['eval_accuracy']:.1%}, loss {record['eval_loss']:.3f}"
    return f"held out: perplexity {record['perplexity']:.2f}"
