"""`models.load` and `read_tensors` on quantized directories: what they take, and what they say."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.core.errors import ConfigError, ModelFileError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.disk import safetensors_file
from tests.parity.quantized.test_quantized import RECORDED

GPTQ = RECORDED / "gptq"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def directory(tmp_path):
    """A copy of a GPTQ model, to be changed."""
    return shutil.copytree(GPTQ, tmp_path / "model")


def change(directory, config=lambda x: x, tensors=lambda x: x):
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config(settings)))
    found, metadata = safetensors_file.read(directory / "model.safetensors")
    safetensors_file.write(directory / "model.safetensors", tensors(found), metadata)


def without(settings, *names):
    return {name: x for name, x in settings.items() if name not in names}


def kernels(params):
    return {path: x for path, x in flatten_with_paths(params)[0].items() if "kernel" in path}


def test_a_quantized_directory_needs_a_choice():
    with pytest.raises(ConfigError, match=r"gptq: its weights are quantized \(gptq\): pass quant"):
        models.load(GPTQ)
    floats = models.load(GPTQ, "bfloat16").params
    assert {str(x.dtype) for x in kernels(floats).values()} == {"bfloat16"}
    kept = models.load(GPTQ, quantize="keep", scan=True)
    found = kernels(kept.params)
    assert all(is_quantized(x) and x.kind == "int4_zero" for x in found.values())
    assert found["layers/mlp/up/kernel"].shape == (1, 32, 64)
    assert {str(x.dtype) for x in found.values()} == {"float16"}
    again = models.load(GPTQ, "float32", quantize="fp8").params
    assert {x.kind for x in kernels(again).values()} == {"fp8"}


def test_a_model_of_floats_is_saved_without_a_quantization(tmp_path):
    loaded = models.load(GPTQ, "float32")
    models.save(tmp_path / "saved", loaded)
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    saved = models.load(tmp_path / "saved")
    for path, x in kernels(loaded.params).items():
        np.testing.assert_array_equal(kernels(saved.params)[path], x)


def test_groups_by_activation_cannot_be_kept_but_read():
    """Requantizing reads them too."""
    path = RECORDED / "gptq_desc_act"
    with pytest.raises(ModelFileError, match=r"desc_act: .*groups by their activations.*dtype="):
        models.load(path, quantize="keep")
    made = models.load(path, "float32", quantize="int8").params
    floats = kernels(models.load(path, "float32").params)
    for name, x in kernels(made).items():
        np.testing.assert_allclose(x.dequantize(), floats[name], atol=0.01)


def test_the_configuration_of_old_files(directory):
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    zeros = {f"{QUERY}.bias": np.zeros(32, "float16")}
    change(directory, lambda x: without(x, "quantization_config"), lambda x: x | zeros)
    (directory / "quantize_config.json").write_text(
        json.dumps(without(quantization, "quant_method"))
    )
    expected = kernels(models.load(GPTQ, "float32").params)
    for path, x in kernels(models.load(directory, "float32").params).items():
        np.testing.assert_array_equal(x, expected[path])
    ones = {f"{QUERY}.bias": np.ones(32, "float16")}
    change(directory, tensors=lambda x: x | ones)
    with pytest.raises(ModelFileError, match=r"q_proj\.bias: unexpected"):
        models.load(directory, "float32")


def test_a_part_that_is_missing_is_named(directory):
    change(directory, tensors=lambda x: without(x, f"{QUERY}.scales"))
    with pytest.raises(ModelFileError, match=rf"model: {QUERY}\.scales: missing, a part of"):
        models.load(directory, quantize="keep")


def test_another_method_is_named(directory):
    change(directory, lambda x: x | {"quantization_config": {"quant_method": "aqlm"}})
    with pytest.raises(ModelFileError, match="quant_method 'aqlm' is not one of bitsandbytes, gp"):
        models.load(directory, "float32")


def test_some_tensors_of_a_model_that_is_not_known():
    key = "model.layers.0.mlp.experts.gate_up_proj"
    found = models.read_tensors(RECORDED / "gpt_oss", r".*experts\..*", quantize="keep")
    assert set(found) == {key, f"{key}_bias"}
    assert found[key].shape == (2, 96, 6) and found[key].axis == -2
    assert found[key].dtype == found[f"{key}_bias"].dtype == jnp.bfloat16
    floats = models.read_tensors(RECORDED / "gpt_oss", key)
    np.testing.assert_array_equal(found[key].dequantize(), floats[key])
    with pytest.raises(ConfigError, match=r"names: '\(' is not a regex"):
        models.read_tensors(RECORDED / "gpt_oss", "(")
    with pytest.raises(ConfigError, match="quantize: 'nf4' is not 'keep' or None"):
        models.read_tensors(RECORDED / "gpt_oss", quantize="nf4")
