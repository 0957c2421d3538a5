"""Progress of a run: bars on a terminal, lines elsewhere."""

import datetime
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
from lora_jax.training.running.speed import in_units

Item = TypeVar("Item")

_BAR_WIDTH = 14  # so that all columns fit into 80
_WIDE = 110  # columns that hold all of the speed
_RECENT = 20  # steps that the speed is measured over


class Pace:
    """How fast a run goes, by the records of its last steps without the first, which compiles.

    >>> pace = Pace()
    >>> for step, seconds in ((1, 60.0), (2, 0.5), (3, 1.5)):
    ...     pace.add({"step": step, "loss": 1.0, "tokens": 100, "seconds": seconds})
    >>> pace.seconds_per_step, pace.tokens_per_second
    (1.0, 100.0)
    """

    def __init__(self) -> None:
        self._steps: list[tuple[float, float, float]] = []  # seconds, tokens, operations
        self._has_compiled = False

    def add(self, record: Record) -> None:
        """Take the record of a step into account."""
        if self._has_compiled:
            measured = (record["seconds"], record["tokens"], record.get("flops", 0))
            self._steps = [*self._steps, measured][-_RECENT:]
        self._has_compiled = True

    @property
    def is_known(self) -> bool:
        """Whether a step was measured."""
        return bool(self._steps)

    @property
    def seconds_per_step(self) -> float:
        """The mean over the last steps."""
        return float(np.mean([seconds for seconds, *_ in self._steps]))

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second, over the last steps."""
        return self._per_second(1)

    @property
    def flops_per_second(self) -> float:
        """Operations per second, over the last steps; 0 if they are not known."""
        return self._per_second(2)

    def _per_second(self, column: int) -> float:
        sums = np.sum(self._steps, axis=0)
        return float(sums[column] / max(sums[0], 1e-9))


def lines(say: Callable[[str], None], steps: int, every: int) -> Callable[[Record], None]:
    """Return a function of the log's records that says one line every so many steps.

    Args:
      say: takes a line.
      steps: number of steps in the whole run.
      every: steps between lines; the first and the last step have one too.
    """
    pace = Pace()
    first: list[int] = []

    def show(record: Record) -> None:
        if "loss" not in record:
            return
        pace.add(record)
        step = record["step"]
        first.append(step)
        if step in (first[0], steps) or step % every == 0:
            say(describe_step(record, pace, steps))

    return show


def describe_step(record: Record, pace: Pace, steps: int) -> str:
    """Return a step in words: loss, learning rate, and once they are known speed and time left.

    >>> pace, record = Pace(), {"step": 3, "loss": 2.5, "lr": 2e-4, "tokens": 1200, "seconds": 0.5}
    >>> describe_step(record, pace, steps=243)
    'step 3 of 243: loss 2.500, lr 2.0e-04'
    >>> pace.add(record)
    >>> pace.add(record)
    >>> describe_step(record, pace, steps=243)
    'step 3 of 243: loss 2.500, lr 2.0e-04, 2,400 tokens/s, 0:02:00 left'
    >>> pace, record = Pace(), {**record, "flops": 3 * 10**12, "peak_bytes": 27 * 10**9}
    >>> pace.add(record)
    >>> pace.add(record)
    >>> describe_step(record, pace, steps=243).partition("tokens/s, ")[2]
    '6.00 TFLOP/s, peak 27.0 GB, 0:02:00 left'
    """
    rate = f", lr {record['lr']:.1e}" if "lr" in record else ""
    words = f"step {record['step']} of {steps}: loss {record['loss']:.3f}{rate}"
    if not pace.is_known:
        return words
    left = datetime.timedelta(seconds=round(pace.seconds_per_step * (steps - record["step"])))
    return ", ".join([words, *describe_speed(record, pace, "tokens/s"), f"{left} left"])


def describe_speed(record: Record, pace: Pace, tokens: str) -> list[str]:
    """Return the speed in words: tokens per second, and what else is known."""
    words = [f"{pace.tokens_per_second:,.0f} {tokens}"]
    if pace.flops_per_second:
        words.append(in_units(pace.flops_per_second, "FLOP/s"))
    if "peak_bytes" in record:
        words.append(f"peak {in_units(record['peak_bytes'], 'B')}")
    return words


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
    pace = Pace()
    with new_progress(console, *more) as progress:
        task = progress.add_task(
            "train", total=steps, completed=done, loss="compiling", held_out=""
        )

        def show(record: Record) -> None:
            if "loss" in record:
                pace.add(record)
                losses.append(record["loss"])
                speed = describe_speed(record, pace, "tok/s") if pace.is_known else []
                fitting = speed if console.width >= _WIDE else speed[:1]
                shown = ", ".join([f"loss {np.mean(losses[-10:]):.3f}", *fitting])
                progress.update(task, completed=record["step"], loss=shown)
            else:
                progress.update(task, held_out=_describe_briefly(record))

        yield show


def _describe_briefly(record: Record) -> str:
    if "eval_accuracy" in record:
        return f"acc {record['eval_accuracy']:.1%}"
    return f"ppl {record['perplexity']:.2f}"


def track(console: Console, name: str) -> Callable[[Iterable[Item], int], Iterator[Item]]:
    """Return a wrapper for an iterable of known length, which shows a bar while it is consumed.

    >>> list(track(Console(), "count")([1, 2, 3], 3))
    [1, 2, 3]
    """

    def wrap(items: Iterable[Item], total: int) -> Iterator[Item]:
        with new_progress(console) as progress:
            yield from progress.track(items, total=total, description=name)

    return wrap


def new_progress(console: Console, *more: ProgressColumn) -> Progress:
    """Return bars with a name, a count, the time that is left and more columns."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR_WIDTH),
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
        margin = f", margin {record['eval_margin']:.3f}" if "eval_margin" in record else ""
        accuracy = f"held out: accuracy {record['eval_accuracy']:.1%}"
        return f"{accuracy}{margin}, loss {record['eval_loss']:.3f}"
    return f"held out: perplexity {record['perplexity']:.2f}"
