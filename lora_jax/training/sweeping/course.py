"""Which run each slot of a sweep trains, for how long, and what becomes of it then."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_jax.training.errors import TrainingError
from lora_jax.training.sweeping.comparison import DIVERGED, DONE, STOPPED


def milestones(steps: int, runs: int, eta: int | None) -> list[int]:
    """Return after how many of its steps a run is judged; the last is its end.

    Args:
      steps: of a run that is not stopped early.
      runs: how many there are.
      eta: of so many runs one is kept at a milestone before the last; None: all are kept. The
        first step is none: its loss is the same for all.

    >>> milestones(90, 9, 3), milestones(90, 9, None), milestones(6, 100, 3)
    ([10, 30, 90], [90], [2, 6])
    """
    rounds = 0 if eta is None else int(math.log(runs) / math.log(eta) + 1e-9)
    found = {round(steps / eta**k) for k in range(rounds + 1)} if eta else {steps}
    return sorted(found - {0, 1} | {steps})


@dataclass
class Course:
    """The runs in the slots, those that wait, and the scores of those that were judged.

    Without `eta` every run takes all its steps, and a run that waits follows one that is done. With
    it runs are judged at each milestone: a run continues if it is among the best `1 / eta` of all
    that have come so far, at least one, and otherwise gives its slot to the next. This is
    asynchronous successive halving (https://arxiv.org/abs/1810.05934) in the form that stops runs.
    """

    runs: int
    steps: int
    eta: int | None
    slots: list[int | None]  # the run in each slot
    done: list[int]  # the steps that each of these has taken
    waiting: int  # the next run
    scores: dict[int, dict[int, float]] = field(default_factory=dict)  # by milestone and run

    @classmethod
    def new(cls, runs: int, slots: int, steps: int, eta: int | None = None) -> "Course":
        """Return the course before its first step, with a run in every slot.

        Raises:
          TrainingError: there are more slots than runs, or too few runs for `eta`.
        """
        if not 0 < slots <= runs:
            raise TrainingError(f"slots must be from 1 to the number of runs, {runs}, got {slots}")
        if eta is not None and runs < eta:
            raise TrainingError(f"eta {eta}: keeps one of so many runs, but there are {runs}")
        return cls(runs, steps, eta, list(range(slots)), [0] * slots, slots)

    @property
    def is_over(self) -> bool:
        """Whether no slot has a run."""
        return all(run is None for run in self.slots)

    @property
    def stretch(self) -> int:
        """The steps until the next run is to be judged; 0 if one is."""
        return min(self._left(slot) for slot, run in enumerate(self.slots) if run is not None)

    @property
    def due(self) -> list[int]:
        """The slots whose runs are to be judged."""
        return [i for i, run in enumerate(self.slots) if run is not None and not self._left(i)]

    @property
    def total(self) -> int | None:
        """The steps of the whole sweep; None where they depend on the scores."""
        if self.eta is not None:
            return None
        return -(-self.runs // len(self.slots)) * self.steps

    def advance(self, steps: int = 1) -> None:
        """Let every run take some steps, at most `stretch`."""
        for slot, run in enumerate(self.slots):
            self.done[slot] += steps * (run is not None)

    def judge(self, scores: Mapping[int, float]) -> tuple[dict[int, str], list[int]]:
        """Take the scores of the runs that are due, and say which of them end and which follow.

        Args:
          scores: by slot, for those in `due`; the lower the better, infinite if a run diverged.

        Returns:
          How runs ended, `DONE`, `STOPPED` or `DIVERGED`, by the slots that they had; and the slots
          that have a new run now.
        """
        for slot, score in scores.items():
            at = self.scores.setdefault(self.done[slot], {})
            at[self._run(slot)] = score
        ended = {slot: how for slot in scores if (how := self._ending(slot)) is not None}
        started = []
        for slot in ended:
            self.slots[slot], self.done[slot] = None, 0
            if self.waiting < self.runs:
                self.slots[slot] = self.waiting
                self.waiting += 1
                started.append(slot)
        return ended, started

    def to_json(self) -> dict[str, Any]:
        """Return what changes in a course, as plain JSON."""
        scores = [
            [milestone, run, score if math.isfinite(score) else None]
            for milestone, found in self.scores.items()
            for run, score in found.items()
        ]
        return {
            "slots": list(self.slots),
            "done": list(self.done),
            "waiting": self.waiting,
            "scores": scores,
        }

    def restored(self, found: Mapping[str, Any]) -> "Course":
        """Return the course as `to_json` described it.

        Raises:
          KeyError, TypeError, ValueError: the description is damaged.
        """
        scores: dict[int, dict[int, float]] = {}
        for milestone, run, score in found["scores"]:
            scores.setdefault(milestone, {})[run] = math.inf if score is None else score
        slots, done = list(found["slots"]), list(found["done"])
        are_runs = all(run is None or 0 <= run < self.runs for run in slots)
        if not are_runs or not len(slots) == len(done) == len(self.slots):
            raise ValueError("not a course of these runs")
        return Course(self.runs, self.steps, self.eta, slots, done, found["waiting"], scores)

    def _run(self, slot: int) -> int:
        run = self.slots[slot]
        assert run is not None
        return run

    def _left(self, slot: int) -> int:
        judged = self.scores.get(self.done[slot], {})
        here = 0 if self._run(slot) in judged else 1
        ahead = milestones(self.steps, self.runs, self.eta)
        return min(m for m in ahead if m + here > self.done[slot]) - self.done[slot]

    def _ending(self, slot: int) -> str | None:
        score, reached = self._score(slot), self.done[slot]
        if math.isinf(score):
            return DIVERGED
        if reached == self.steps:
            return DONE
        assert self.eta is not None
        best = sorted((other, run) for run, other in self.scores[reached].items())
        kept = best[: max(1, len(best) // self.eta)]
        return None if (score, self._run(slot)) in kept else STOPPED

    def _score(self, slot: int) -> float:
        return self.scores[self.done[slot]][self._run(slot)]
