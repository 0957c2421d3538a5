"""`halving`: train many runs a little, and the best of them longer (successive halving)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.sweeps.run import Run
from lora_jax.adapters.sweeps.state import SweepState
from lora_jax.adapters.sweeps.sweep import Sweep
from lora_jax.core.checks import is_integer, is_number
from lora_jax.core.errors import ConfigError
from lora_jax.core.slots import unpadded
from lora_jax.core.tree import map_adapted

#: The batch of a step: the arguments of the loss behind the parameters.
Batches = Callable[[int], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one run of a `halving`.

    Attributes:
      run: the run.
      steps: how many steps it has trained.
      score: the loss after its last round; the lower, the better, and NaN is worse than all others.
      losses: those of its steps, `[steps]`.
      adapters: its overlay, as `split` returns one, in host memory.
    """

    run: Run
    steps: int
    score: float
    losses: np.ndarray
    adapters: Any

    def __repr__(self) -> str:
        return f"Outcome(steps={self.steps}, score={self.score:.6g}, {self.run})"


def halving(
    sweep: Sweep,
    batches: Batches,
    *,
    steps: int,
    eta: float = 3,
    validation: Sequence[Sequence[Any]] = (),
    report: Callable[[int, list[Outcome]], None] | None = None,
) -> list[Outcome]:
    """Train all runs of a sweep for some steps, then the best 1/η of them η times as long, and on.

    Successive halving, https://arxiv.org/abs/1502.07943: every round divides the runs by η and
    multiplies the steps that each has trained by η, until one run is left. Of n runs in round k
    ⌊n/ηᵏ⌋ train, at least one, until they have made steps·ηᵏ steps in total. If there are more runs
    than slots, those of a round take turns. A run that pauses keeps its adapters and its optimizer
    state in host memory, and continues where it was: its losses are those that it would have alone.
    Nothing recompiles, and the same arguments give the same result.

    Args:
      sweep: the runs, and how many train at once: its `slots`.
      batches: the batch of a step, by the number of the step from 0. Every run sees the same ones.
      steps: the steps of the first round, a positive integer.
      eta: η, a number above 1.
      validation: batches that the score is the mean loss of, without dropout. Without them it is
        the mean loss of the last tenth of a run's training steps.
      report: called after each round with its number, from 0, and the outcomes so far, best first.

    Returns:
      The outcome of every run: the one that is left first, then those that went out in the last
      round, and so on; each round sorted by score.

    Raises:
      ConfigError: `steps` or `eta` has no meaning; or the sweep gives each slot its own batch, or
        measures something else than losses.

    >>> import jax.numpy as jnp, lora_jax
    >>> base, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((5, 4))
    >>> loss = lora_jax.lora(lambda params, x: ((x @ params["kernel"]) ** 2).mean())
    >>> runs = lora_jax.grid(rank=2, learning_rate=[1e-4, 1e-3, 1e-2, 1e-1])
    >>> sweep = lora_jax.sweep(loss, base, runs, lora_jax.LoraConfig(), x, slots=2)
    >>> outcomes = halving(sweep, lambda step: (x,), steps=4, eta=2)
    >>> [(outcome.run.learning_rate, outcome.steps) for outcome in outcomes]
    [(0.1, 16), (0.01, 8), (0.001, 4), (0.0001, 4)]
    """
    if not is_integer(steps) or steps <= 0:
        raise ConfigError(f"halving: steps must be a positive integer, got {steps!r}")
    if not is_number(eta) or not 1 < eta < math.inf:
        raise ConfigError(f"halving: eta must be a number above 1, got {eta!r}")
    if sweep.has_own_batches:
        raise ConfigError(
            "halving: a slot trains one run after another here, so all see the same batch; make "
            "the sweep without batch_axes="
        )
    trials = [_Trial(number, run) for number, run in enumerate(sweep.runs)]
    gone: list[_Trial] = []
    state, number = sweep.init(), 0
    while True:
        until = math.ceil(steps * eta**number)
        for group in sweep.turns([trial.run for trial in trials]):
            chosen = {slot: trials[i] for i, slot in group.items()}
            state = _train(sweep, state, chosen, batches, until, validation)
        trials.sort(key=lambda trial: trial.order)
        number += 1
        kept = max(1, math.floor(len(sweep.runs) / eta**number))
        is_last = len(trials) == 1
        trials, gone = trials[:kept], [*trials[kept:], *gone]
        outcomes = [trial.outcome() for trial in (*trials, *gone)]
        if report is not None:
            report(number - 1, outcomes)
        if is_last:
            return outcomes


@dataclasses.dataclass
class _Trial:
    """A run, and how far it is."""

    number: int
    run: Run
    paused: SweepState | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    score: float = math.inf

    @property
    def order(self) -> tuple[bool, float, int]:
        """What trials are sorted by, the best first."""
        return (math.isnan(self.score), self.score, self.number)

    def outcome(self) -> Outcome:
        """Return what became of it so far."""
        assert self.paused is not None
        own = jax.tree.map(np.asarray, self.paused.adapters)
        adapters = map_adapted(lambda _, node: unpadded(node), own)
        return Outcome(self.run, len(self.losses), self.score, np.array(self.losses), adapters)


def _train(
    sweep: Sweep,
    state: SweepState,
    chosen: dict[int, _Trial],
    batches: Batches,
    until: int,
    validation: Sequence[Sequence[Any]],
) -> SweepState:
    """Train one trial per slot up to a number of steps, and let it pause; other slots are idle."""
    for slot, trial in chosen.items():
        own = sweep.start(trial.run) if trial.paused is None else trial.paused
        state = sweep.put(state, slot, own)
    done = len(next(iter(chosen.values())).losses)
    found = []
    for step in range(done, until):
        state, losses = sweep.step(state, *batches(step))
        if not isinstance(losses, jax.Array):
            raise ConfigError(
                "halving: the sweep's gradients= measures something else than the losses; return "
                "(gradients, loss) from it"
            )
        found.append(losses)
    table = np.array([np.asarray(x) for x in found]).reshape(-1, sweep.slots)  # [steps, slots]
    scores = [np.asarray(sweep.evaluate(state, *batch)) for batch in validation]
    for slot, trial in chosen.items():
        trial.losses += table[:, slot].tolist()
        tail = trial.losses[-max(1, len(trial.losses) // 10) :]
        trial.score = float(np.mean([x[slot] for x in scores] if scores else tail))
        trial.paused = jax.device_get(sweep.take(state, slot))
    return state
