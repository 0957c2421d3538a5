"""Adapters of experts that peft 0.21.2 made for transformers 5.24's models: the logits of both."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models, peft

HERE = pathlib.Path(__file__).parent
RECORDED = np.load(HERE / "recorded" / "mixtures.npz")


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("mixtral", True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in [("mixtral", False), ("gpt_oss", False), ("gpt_oss", True)]
        ),
    ],
)
def test_logits_equal_transformers(name, scan, tmp_path, quick_compile):
    for file in (peft.CONFIG, peft.TENSORS):
        (tmp_path / file).write_bytes(RECORDED[f"{name}/{file}"].tobytes())
    model = models.load(HERE.parents[1] / "models" / "fixtures" / name, jnp.float32, scan=scan)
    naming = model.family.naming(peft.read_file(tmp_path).tensors)
    adapters = peft.load(tmp_path, model.params, naming)
    params = lora_jax.join(model.params, adapters)
    run = jax.jit(lora_jax.lora(model.apply))
    ids = jnp.asarray(RECORDED[f"{name}/ids"])
    y = run(params, ids)
    np.testing.assert_allclose(y, RECORDED[f"{name}/y"], atol=1e-5 * np.abs(y).max())
    # with the names of the model's own files: a module per expert, gate and up apart
    peft.save(tmp_path / "again", params, model.naming)
    read = peft.load(tmp_path / "again", model.params, model.naming)
    again = run(lora_jax.join(model.params, read), ids)
    np.testing.assert_allclose(again, y, atol=1e-5 * np.abs(y).max())
