"""`lora-jax train --router-loss`: the routers' loss of `transformers`, and where there is none."""

import json

import jax
import numpy as np
import pytest

from lora_jax.cli.jobs.training.data import language_loss
from lora_jax.cli.jobs.training.model import to_trainable
from tests.cli.train.command import SMALL
from tests.models.recorded import FIXTURES, MIXED, expected, load


def test_a_model_without_experts_and_other_tasks_refuse_it(model, fails, play, tmp_path):
    train = ("train", *SMALL, "--data", play, "--model", model, "--out", tmp_path / "run")
    assert "has no experts" in fails(*train, "--router-loss", 0.1, "--steps", 1)
    refused = fails(*train, "--router-loss", 0.1, "--task", "dpo", status=2)
    assert "'--router-loss': is for --task causal-lm" in refused


@pytest.mark.slow
@pytest.mark.parametrize("trained", [(), ("head/kernel",)])
def test_the_loss_is_that_of_transformers(trained):
    """Recorded by record_models.py: the mean cross-entropy plus half the routers' loss."""
    given, model = expected(MIXED), to_trainable(load(MIXED), None)
    ids, mask = (given[key].astype(np.int32) for key in ("ids", "mask"))
    weights = np.pad(mask[:, 1:] * mask[:, :-1], [(0, 0), (1, 0)])
    batch = {"ids": ids, "segments": mask, "weights": weights}
    loss = language_loss(model, trained, packed=True, router_loss=0.5)
    sums = jax.jit(loss)(model.params, batch)
    want = json.loads((FIXTURES / "router_losses.json").read_text())[MIXED]["loss"]
    np.testing.assert_allclose(sums["loss"] / sums["weight"], want, rtol=1e-5)
