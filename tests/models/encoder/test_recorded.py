"""Encoders of texts against transformers 5.24 and peft 0.21.2, as record_encoders.py recorded."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files.disk import safetensors_file
from tests.models import recorded

pytestmark = pytest.mark.usefixtures("quick_compile")
NAMES = ("roberta", "modernbert")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def write_adapter(name, folder):
    for file in (peft.CONFIG, peft.TENSORS):
        (folder / file).write_bytes(recorded.expected(name)[file].tobytes())
    return folder


def same_tensors(one, other):
    (got, _), (want, _) = safetensors_file.read(one), safetensors_file.read(other)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])


def test_hidden_states_with_an_adapter_and_without(name, tmp_path):
    """The two texts in one row, and the second alone in another one."""
    model, want = recorded.load(name), recorded.expected(name)
    first, second = (want["ids"][i, :n] for i, n in enumerate(want["mask"].sum(1)))
    longest = len(first) + len(second)
    ids = np.stack([np.append(first, second), np.resize(second, longest)])
    segments = np.ones_like(ids)
    segments[0, len(first) :] = 2
    segments[1, len(second) :] = 0
    adapters = peft.load(write_adapter(name, tmp_path), model.params, model.naming)
    params = lora.join(model.params, adapters)
    apply = jax.jit(lora.lora(model.apply, on_dense="error"))
    for key, given in {"adapted": params, "hidden": lora.disable(params)}.items():
        y, (one, other) = apply(given, ids, segments), want[key]
        np.testing.assert_allclose(y[0, : len(first)], one, atol=2e-5)
        for found in (y[0, len(first) :], y[1, : len(second)]):
            np.testing.assert_allclose(found, other[: len(second)], atol=2e-5)


def test_files_written_are_those_read(name, tmp_path):
    model = recorded.load(name)
    models.save(tmp_path / "model", model)
    file = "model.safetensors"
    same_tensors(tmp_path / "model" / file, recorded.FIXTURES / name / file)
    source = write_adapter(name, tmp_path)
    adapters, config = peft.load(source, model.params, model.naming), peft.read_config(source)
    peft.save(tmp_path / "again", adapters, model.naming, base=model.params, config=config)
    same_tensors(tmp_path / "again" / peft.TENSORS, source / peft.TENSORS)


def test_quantized_while_it_is_read(name):
    """The codes stand for the rounded kernels of each linear layer, on whichever axes they are."""
    model, want = models.load(recorded.FIXTURES / name, quantize="int8"), recorded.load(name)
    kernels = {"attention/query", "attention/qkv", "mlp/input", "intermediate"}
    leaves, _ = flatten_with_paths(want.params)
    found = 0
    for path, x in leaves.items():
        node = model.params
        for part in path.split("/"):
            node = node[part]
        if any(path.endswith(f"{end}/kernel") for end in kernels):
            found += 1
            assert isinstance(node, lora.QuantizedWeight)
            np.testing.assert_allclose(lora.dequantize(node), x, atol=float(np.abs(x).max()) / 127)
    assert found >= 4
