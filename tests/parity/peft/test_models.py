"""Adapters that peft made for transformers' models, on the Flax models: the logits of both."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models, peft
from lora_jax.files.disk import safetensors_file

HERE = pathlib.Path(__file__).parent
RECORDED = np.load(HERE / "recorded" / "models.npz")


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("llama", False),
        ("llama_tied", True),
        ("qwen2", True),
        ("gemma3_text", True),
        pytest.param("phi3", False, marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers(name, scan, tmp_path, quick_compile):
    for file in (peft.CONFIG, peft.TENSORS):
        (tmp_path / file).write_bytes(RECORDED[f"{name}/{file}"].tobytes())
    model = models.load(HERE.parents[1] / "models" / "fixtures" / name, jnp.float32, scan=scan)
    adapters = peft.load(tmp_path, model.params, model.naming)
    params = lora_jax.join(model.params, adapters)
    y = jax.jit(lora_jax.lora(model.apply))(params, jnp.asarray(RECORDED[f"{name}/ids"]))
    np.testing.assert_allclose(y, RECORDED[f"{name}/y"], atol=1e-5 * np.abs(y).max())
    config = peft.read_config(tmp_path)
    peft.save(tmp_path / "again", adapters, model.naming, base=model.params, config=config)
    want, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    got, _ = safetensors_file.read(tmp_path / "again" / peft.TENSORS)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])
    again = peft.read_config(tmp_path / "again")
    assert again.ensure_weight_tying == config.ensure_weight_tying
    assert (again.task_type, again.use_rslora) == ("CAUSAL_LM", config.use_rslora)
