"""Early stopping: a run ends where its own recorded losses say so, and resumes from there."""

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax.training import log
from lora_jax.training.batching import cut_stream
from lora_jax.training.errors import TrainingError
from lora_jax.training.loop import Settings, train
from lora_jax.training.optimizer import Optimizer
from tests.training import tiny_model

STEPS = 8


def job(directory, **settings):
    held_out = cut_stream(tiny_model.stream(40, seed=9), 9)
    made, start = tiny_model.job(directory, STEPS, held_out=held_out, eval_every=1, **settings)
    optimizer = Optimizer(1.0, "constant", warmup=0)  # at which the loss falls and rises
    return dataclasses.replace(made, tx=optimizer.transformation(start, STEPS)), start


def ends_at(losses, patience):
    """Walk along the losses by hand: the step after which `patience` of them were not lower."""
    best, waited = losses[0], 0
    for step, loss in enumerate(losses[1:], start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            return step
    return len(losses) - 1


def bits(outcome):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(outcome.adapters)]


@pytest.mark.slow
def test_a_run_ends_where_its_losses_say(tmp_path, quick_compile):
    whole = train(*job(None))
    curve = [r["eval_loss"] for r in log.evaluations(whole.records)]
    assert len(curve) == STEPS + 1 and not whole.ended_early
    patience = next(p for p in (1, 2, 3) if ends_at(curve, p) < STEPS)
    end = ends_at(curve, patience)

    short = train(*job(tmp_path, patience=patience))
    assert (short.step, short.ended_early) == (end, True)
    assert [r["eval_loss"] for r in log.evaluations(short.records)] == curve[: end + 1]

    again = train(*job(tmp_path, patience=patience))  # resumed, it has nothing left to do
    assert (again.step, again.ended_early, again.records) == (end, True, short.records)
    longer = train(*job(tmp_path, patience=STEPS))  # resumed with more patience, it continues
    assert (longer.step, longer.ended_early) == (STEPS, False) and bits(longer) == bits(whole)


@pytest.mark.parametrize(
    "losses, waited",
    [([], 0), ([2.0], 0), ([2, 1], 0), ([1, 2, 3], 2), ([1, 1], 1), ([3, 1, 2, 0.5, 0.6], 1)],
)
def test_how_long_the_best_was_ago(losses, waited):
    records = [{"step": 0, "loss": 0.0}, *({"step": 1, "eval_loss": x} for x in losses)]
    assert log.evaluations_since_best(records) == waited


def test_settings_that_are_refused():
    with pytest.raises(TrainingError, match="patience must not be negative"):
        Settings(1, patience=-1)
