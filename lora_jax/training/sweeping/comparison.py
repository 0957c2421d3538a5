"""How the runs of a sweep compare, by its log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.training import log
from lora_jax.training.loss_curve import window_of

DONE, STOPPED, DIVERGED = "done", "stopped", "diverged"  # how a run ended


@dataclass(frozen=True)
class Result:
    """Where a run stands, or how it ended."""

    name: str
    steps: int  # that it has done
    loss: float  # of training: the mean over its last steps
    eval_loss: float | None
    eval_accuracy: float | None  # of a classifier
    state: str | None  # one of `DONE`, `STOPPED` and `DIVERGED`; None of a run that goes on

    @property
    def score(self) -> float:
        """What runs are compared by: the held-out loss if there is one; infinite if diverged."""
        found = self.loss if self.eval_loss is None else self.eval_loss
        return found if math.isfinite(found) and self.state != DIVERGED else math.inf


def results(names: Sequence[str], records: Sequence[log.Record]) -> list[Result]:
    """Return where each run stands, the best first.

    Runs that were stopped early come after those with more steps; without a step, at the end.

    Args:
      names: of all runs.
      records: of a sweep's log: those with "run" belong to a run, whose own step is "run_step".
    """
    found = [result(name, of_run(records, name)) for name in names]
    return sorted(found, key=lambda x: (x.state != DONE, -x.steps, x.score))


def of_run(records: Sequence[log.Record], name: str) -> list[dict[str, object]]:
    """Return the records of one run, as those of a run of `lora-jax train`."""
    return [{**r, "step": r["run_step"]} for r in records if r.get("run") == name]


def result(name: str, records: Sequence[log.Record]) -> Result:
    """Return where one run stands, by its own records."""
    steps, losses = log.losses([dict(r) for r in records])
    is_lost = any("diverged" in r for r in records)
    judged = [r for r in records if "eval_loss" in r]
    states = [r["ended"] for r in records if "ended" in r]
    return Result(
        name,
        steps[-1] if steps else 0,
        float(np.mean(losses[-window_of(len(losses)) :])) if losses and not is_lost else math.inf,
        judged[-1]["eval_loss"] if judged else None,
        judged[-1].get("eval_accuracy") if judged else None,
        states[-1] if states else None,
    )
