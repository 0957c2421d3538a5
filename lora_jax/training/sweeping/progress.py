"""Progress of a sweep: a bar for each slot on a terminal, lines elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TaskID, TextColumn

from lora_jax.training.log import Record
from lora_jax.training.progress import Pace, describe_speed, new_progress
from lora_jax.training.sweeping.comparison import DONE

Show = Callable[[Sequence[Record]], None]  # takes the records of one step, or of what ended


def lines(say: Callable[[str], None], names: Sequence[str], steps: int, every: int) -> Show:
    """Return a function of the log's records that says one line every so many steps.

    Args:
      say: takes a line.
      names: of all runs.
      steps: of each run.
      every: steps between lines; the first step and the end of a run have one too.
    """
    pace, seen = Pace(), []

    def show(records: Sequence[Record]) -> None:
        for record in records:
            if "ended" in record:
                say(f"{record['run']}: {record['ended']} after step {record['run_step']}")
            elif "eval_loss" in record:
                say(f"{record['run']}: held-out loss {record['eval_loss']:.4f}")
            elif "seconds" in record:
                pace.add(record)
                seen.append(record["step"])
                if record["step"] % every == 0 or len(seen) == 1:
                    say(describe_step(record, records, pace))

    return show


def describe_step(whole: Record, records: Sequence[Record], pace: Pace) -> str:
    """Return a step of all runs in words.

    >>> record = {"step": 3, "run": "rank4-lr1e-4", "run_step": 3, "loss": 2.5}
    >>> other = {"step": 3, "run": "rank8-lr1e-4", "run_step": 3, "loss": 2.0}
    >>> describe_step({"step": 3, "tokens": 9, "seconds": 1.0}, [record, other], Pace())
    'step 3, 2 runs: loss 2.000 (rank8-lr1e-4) to 2.500'
    """
    losses = sorted((r["loss"], r["run"]) for r in records if "loss" in r)
    running = sum("run" in record for record in records)
    runs = f"{running} run{'s' if running != 1 else ''}"
    words = f"step {whole['step']}, {runs}: "
    words += f"loss {losses[0][0]:.3f} ({losses[0][1]})" if losses else "all diverged"
    if len(losses) > 1:
        words += f" to {losses[-1][0]:.3f}"
    speed = describe_speed(whole, pace, "tokens/s") if pace.is_known else []
    return ", ".join([words, *speed])


@contextmanager
def bars(console: Console, names: Sequence[str], steps: int) -> Iterator[Show]:
    """Show a bar for the runs and one for each run that trains, with its loss.

    Args:
      console: where they are drawn, if that is a terminal.
      names: of all runs.
      steps: of each run.
    """
    pace, tasks, ended = Pace(), dict[str, TaskID](), set[str]()
    with new_progress(console, TextColumn("{task.fields[shown]}")) as progress:
        whole = progress.add_task("runs", total=len(names), shown="compiling")

        def place(record: Record) -> TaskID:
            if record["run"] not in tasks:
                tasks[record["run"]] = progress.add_task(record["run"], total=steps, shown="")
            return tasks[record["run"]]

        def show(records: Sequence[Record]) -> None:
            for record in records:
                if "seconds" in record:
                    pace.add(record)
                    speed = describe_speed(record, pace, "tok/s") if pace.is_known else []
                    progress.update(whole, shown=", ".join(speed[:1]))
                elif "loss" in record:
                    loss = f"loss {record['loss']:.3f}"
                    progress.update(place(record), completed=record["run_step"], shown=loss)
                elif "eval_loss" in record:
                    progress.update(place(record), shown=f"held out {record['eval_loss']:.3f}")
                elif "ended" in record:
                    ended.add(record["run"])
                    progress.update(whole, completed=len(ended))
                    progress.stop_task(place(record))
                    if record["ended"] != DONE:
                        progress.update(place(record), shown=record["ended"])

        yield show
