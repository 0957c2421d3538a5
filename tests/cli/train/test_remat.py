"""`--remat auto` takes the policy that recomputes least of those that fit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lora_jax.cli.jobs.training import choose_remat
from lora_jax.cli.jobs.training.model import TrainableModel, open_model, with_remat
from lora_jax.cli.train_options import TrainOptions
from lora_jax.models.encoder.bert import Bert, BertConfig
from lora_jax.models.families import FAMILIES
from lora_jax.training.running import step_memory
from tests.training import tiny_model

NEEDED = {"none": 9e9, "sums": 5e9, "full": 2e9}


@pytest.fixture
def model():
    return open_model("tiny", "float32", scan=False)


def chosen(monkeypatch, remat="auto", memory=None, machine=16e9):
    monkeypatch.setattr(choose_remat, "available_bytes", lambda: machine)
    options, said = TrainOptions("tiny", [], None, remat=remat, memory=memory), []
    return choose_remat.choose(options, NEEDED.__getitem__, said.append), said


@pytest.mark.parametrize(
    ("given", "policy", "line"),
    [
        ({}, "none", "--remat none: a step needs 9.00 GB of 16.00 GB"),
        ({"machine": 8e9}, "sums", "--remat sums: a step needs 5.00 GB of 8.00 GB"),
        ({"memory": 4.5}, "full", "--remat full: a step needs 2.00 GB of 4.50 GB"),
        (
            {"memory": 1.0},
            "full",
            "--remat full: a step needs 2.00 GB of 1.00 GB; that is too much: lower --batch or "
            "--length",
        ),
        ({"remat": "sums"}, "sums", None),
        ({"remat": "none"}, "none", None),
    ],
)
def test_the_first_that_fits(monkeypatch, given, policy, line):
    assert chosen(monkeypatch, **given) == (policy, [line] if line else [])


def test_an_encoder_too(model):
    encoder: TrainableModel = dataclasses.replace(
        model,
        module=Bert(BertConfig(9, 4, 1, 2, 4)),
        family=FAMILIES["bert"],
        settings={"model_type": "bert"},
    )
    assert with_remat(encoder, "full").hidden.module.config.remat == "full"


def test_what_a_step_needs_and_what_there_is(tmp_path, optimized):
    """The bytes of the arguments are known; a machine has more than this test takes."""
    job, adapters = tiny_model.job(None, rows=3)
    few, many = (
        step_memory.needed_bytes(dataclasses.replace(job, settings=settings), adapters)
        for settings in (job.settings, dataclasses.replace(job.settings, rows=300))
    )
    base = sum(x.nbytes for x in job.base.values())
    assert base < few < many
    assert step_memory.available_bytes() > many


def test_copies_of_a_narrow_base(optimized, monkeypatch):
    """A CPU that widens weights does so once for each; a vector is not worth counting."""
    base = {"kernel": jnp.ones((30, 20), "bfloat16"), "scale": jnp.ones(20, "bfloat16")}
    for widens in (True, False):
        monkeypatch.setattr(step_memory, "is_widened", lambda _, widens=widens: widens)
        assert step_memory.widened_bytes(base) == 4 * 30 * 20 * widens
        assert step_memory.widened_bytes(jax.tree.map(lambda x: x.astype("float32"), base)) == 0


def test_whether_a_cpu_widens_is_what_the_compiler_says(optimized):
    """Forward and dx of one matrix, whose float32 copy is most of the temporary memory, or none."""
    step = jax.jit(jax.value_and_grad(lambda x, w: (x @ w).sum()))
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 512), (512, 512)))
    temporary = step.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    assert step_memory.is_widened(jnp.dtype("bfloat16")) == (temporary >= 4 * 512 * 512)
