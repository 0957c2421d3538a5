"""Progress of a sweep: a bar for each run on a terminal, lines elsewhere."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from lora_jax.training.log import Record
from lora_jax.training.progress import Pace, describe_speed, new_progress
from lora_jax.training.sweeping.comparison import DONE

Show = Callable[[Sequence[Record]], None]  # takes the records of one step, or of what ended

_ROWS = 6  # of a terminal that bars of runs leave free


def lines(say: Callable[[str], None], total: int | None, every: int) -> Show:
    """Return a function of the log's records that says one line every so many steps.

    Args:
      say: takes a line.
      total: steps of the whole sweep, if they are known.
      every: steps between lines; the first step and the end of a run have one too.
    """
    pace, seen, held_out = Pace(), list[int](), dict[str, float]()

    def show(records: Sequence[Record]) -> None:
        for record in records:
            if "ended" in record:
                judged = held_out.pop(record["run"], None)
                more = "" if judged is None else f", held-out loss {judged:.4f}"
                say(f"{record['run']}: {record['ended']} at step {record['run_step']}{more}")
            elif "eval_loss" in record:
                held_out[record["run"]] = record["eval_loss"]
            elif "seconds" in record:
                pace.add(record)
                seen.append(record["step"])
                if record["step"] in (seen[0], total) or record["step"] % every == 0:
                    say(describe_step(record, records, pace, total))

    return show


def describe_step(
    whole: Record, records: Sequence[Record], pace: Pace, total: int | None = None
) -> str:
    """Return a step of all runs in words.

    >>> record = {"step": 3, "run": "rank4-lr1e-4", "run_step": 3, "loss": 2.5}
    >>> other = {"step": 3, "run": "rank8-lr1e-4", "run_step": 3, "loss": 2.0}
    >>> describe_step({"step": 3, "tokens": 9, "seconds": 1.0}, [record, other], Pace(), total=9)
    'step 3 of 9: 2 runs, loss 2.000 (rank8-lr1e-4) to 2.500'
    """
    losses = sorted((r["loss"], r["run"]) for r in records if "loss" in r)
    of = "" if total is None else f" of {total}"
    running = sum("run" in record for record in records)
    words = [f"step {whole['step']}{of}: {running} run{'' if running == 1 else 's'}"]
    if losses:
        highest = f" to {losses[-1][0]:.3f}" if len(losses) > 1 else ""
        words.append(f"loss {losses[0][0]:.3f} ({losses[0][1]}){highest}")
    if pace.is_known:
        words += describe_speed(whole, pace, "tokens/s")
        if total is not None:
            left = round(pace.seconds_per_step * (total - whole["step"]))
            words.append(f"{datetime.timedelta(seconds=left)} left")
    return ", ".join(words)


@contextmanager
def bars(console: Console, runs: int, steps: int, total: int | None) -> Iterator[Show]:
    """Show a bar for the sweep, and one with its loss for each run that has started.

    Args:
      console: where they are drawn, if that is a terminal. Runs that ended are left out where it
        has not enough rows for all.
      runs: how many there are.
      steps: of each run.
      total: steps of the whole sweep, if they are known.
    """
    with new_progress(console, TextColumn("{task.fields[shown]}")) as progress:
        yield _Bars(
            progress, progress.add_task("sweep", total=total, shown="compiling"), runs, steps
        )


class _Bars:
    """The bars of a sweep, by the records of its log."""

    def __init__(self, progress: Progress, whole: TaskID, runs: int, steps: int) -> None:
        self._progress, self._whole, self._runs, self._steps = progress, whole, runs, steps
        self._pace, self._tasks, self._ended = Pace(), dict[str, TaskID](), 0

    def __call__(self, records: Sequence[Record]) -> None:
        for record in records:
            if "run" in record:
                self._show_run(record)
            elif "seconds" in record:
                self._pace.add(record)
                self._progress.update(self._whole, completed=record["step"])
        speed = describe_speed({}, self._pace, "tok/s")[:1] if self._pace.is_known else []
        shown = ", ".join([f"{self._ended} of {self._runs} runs ended", *speed])
        self._progress.update(self._whole, shown=shown)

    def _show_run(self, record: Record) -> None:
        if record["run"] not in self._tasks:
            new = self._progress.add_task(record["run"], total=self._steps, shown="")
            self._tasks[record["run"]] = new
        task = self._tasks[record["run"]]
        if "loss" in record:
            loss = f"loss {record['loss']:.3f}"
            self._progress.update(task, completed=record["run_step"], shown=loss)
        elif "eval_loss" in record:
            self._progress.update(task, shown=f"held out {record['eval_loss']:.3f}")
        elif "ended" in record:
            self._ended += 1
            self._progress.stop_task(task)
            if record["ended"] != DONE:
                self._progress.update(task, shown=record["ended"])
            if self._runs > self._progress.console.height - _ROWS:
                self._progress.update(task, visible=False)
