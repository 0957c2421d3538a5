"""Encoders of texts against transformers 5.24 and peft 0.21.2, as record_encoders.py recorded."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.disk import safetensors_file
from lora_jax.models.families import FAMILIES
from lora_jax.models.weights.family import Options
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
        np.testing.assert_allclose(y[0, : len(first)], one, atol=5e-6)
        for found in (y[0, len(first) :], y[1, : len(second)]):
            np.testing.assert_allclose(found, other[: len(second)], atol=5e-6)


def test_files_written_are_those_read(name, tmp_path):
    model = recorded.load(name)
    models.save(tmp_path / "model", model)
    file = "model.safetensors"
    same_tensors(tmp_path / "model" / file, recorded.FIXTURES / name / file)
    source = write_adapter(name, tmp_path)
    adapters, config = peft.load(source, model.params, model.naming), peft.read_config(source)
    peft.save(tmp_path / "again", adapters, model.naming, base=model.params, config=config)
    same_tensors(tmp_path / "again" / peft.TENSORS, source / peft.TENSORS)


@pytest.mark.parametrize(
    ("name", "quantized", "floats"),
    [
        ("roberta", ["layer_0/attention/query"], ["embeddings/word"]),
        ("modernbert", ["layer_0/attention/qkv", "layer_3/mlp/input"], ["embeddings/word"]),
        ("vit", ["layer_1/mlp/down"], ["embeddings/patch", "classifier"]),
        ("siglip", ["vision/layer_0/mlp/up", "text/layer_0/attention/key"], ["text/token"]),
        ("whisper", ["decoder/layer_1/cross/value"], ["encoder/conv1", "decoder/embedding"]),
    ],
)
def test_quantized_while_it_is_read(name, quantized, floats):
    """The codes stand for the rounded kernels of linear layers, on whichever axes they are."""
    model, want = models.load(recorded.FIXTURES / name, quantize="int8"), recorded.load(name)
    leaves, _ = flatten_with_paths(want.params)
    nodes, _ = flatten_with_paths(model.params, is_leaf=is_quantized)
    for path in quantized:
        x = leaves[f"{path}/kernel"]
        atol = float(np.abs(x).max()) / 127
        np.testing.assert_allclose(lora.dequantize(nodes[f"{path}/kernel"]), x, atol=atol)
    for path in floats:
        assert not any(is_quantized(x) for p, x in nodes.items() if p.startswith(path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("roberta", {"pad_token_id": None}, "pad_token_id must be an int, got None"),
        ("roberta", {"pad_token_id": 33}, "first_position must be an int from 0 to below"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types must be 4 of"),
        ("modernbert", {"layer_types": "full_attention"}, "must be a list of names"),
        ("modernbert", {"num_attention_heads": 3}, "is not an even multiple of"),
        ("modernbert", {"hidden_activation": ["gelu"]}, "is not one of"),
        ("modernbert", {"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ("modernbert", {"norm_eps": "small"}, "norm_eps must be a positive number"),
        ("modernbert", {"local_attention": 0}, "local_attention must be a positive int"),
        ("modernbert", {"rope_parameters": 3}, "rope_parameters must be a mapping, got 3"),
        ("modernbert", {"vocab_size": None}, "config.json has no vocab_size"),
        ("roberta", {"is_decoder": True}, "is_decoder is true, but this encoder's tokens see"),
    ],
)
def test_configurations_that_are_refused(name, change, message):
    settings = {**recorded.load(name).settings, **change}
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].module(settings, Options())


def test_what_transformers_4_wrote():
    """The layers that see all were every third, and angles had names of their own."""
    model = recorded.load("modernbert")
    settings = {**model.settings, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    del settings["layer_types"], settings["rope_parameters"]
    assert FAMILIES["modernbert"].module(settings, Options()).config == model.config
    del settings["global_rope_theta"], settings["local_rope_theta"]  # the recorded are its defaults
    assert FAMILIES["modernbert"].module(settings, Options()).config == model.config
    assert model.config.local_rope != model.config.global_rope


def test_long_rows_are_refused(name):
    model = recorded.load(name)
    ids = jax.ShapeDtypeStruct((1, model.longest + 1), "int32")
    with pytest.raises(ValueError, match="is above max_position_embeddings"):
        jax.eval_shape(model.apply, model.params, ids, ids)
