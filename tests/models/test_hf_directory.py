"""Directories of published models: in several files, damaged, and written here."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models, naming
from lora_jax.core.errors import ModelFileError, StructureError
from lora_jax.files.disk import safetensors_file
from lora_jax.models import hf_directory
from lora_jax.models.rope import Rope
from tests.models.recorded import FIXTURES, load

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """Copy the model that transformers wrote to three files."""
    return shutil.copytree(FIXTURES / "llama_tied", tmp_path / "llama_tied")


def tensors(directory):
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_three_files_contain_what_one_contains(sharded, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(sharded / "config.json", tmp_path / "one")
    save_file(tensors(sharded), tmp_path / "one" / "model.safetensors")
    same(models.load(sharded).params, models.load(tmp_path / "one").params)


def test_files_that_do_not_agree_with_their_index(sharded):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    second = load_file(sharded / "model-00002-of-00003.safetensors")
    second["extra"] = second.pop("model.layers.0.input_layernorm.weight")
    save_file(second, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(ModelFileError, match="does not match its files") as error:
        models.load(sharded)
    assert str(error.value).splitlines()[1:] == [
        "  extra: in model-00002-of-00003.safetensors, but the index does not say so",
        "  model-00001-of-00003.safetensors: missing, with 9 tensors",
        "  model.layers.0.input_layernorm.weight: not in model-00002-of-00003.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index.update(weight_map=["a"]), "has no weight_map"),
        (lambda index: index["weight_map"].update(x="../a.safetensors"), "'../a.safetensors' is"),
        (lambda index: index["weight_map"].update(x=3), "3 is not the name of a file"),
    ],
)
def test_an_index_that_is_wrong(sharded, change, message):
    edit(sharded / INDEX, change)
    with pytest.raises(ModelFileError, match=message):
        models.load(sharded)


def test_tensors_that_do_not_fit_are_listed(sharded):
    file = sharded / "model-00003-of-00003.safetensors"
    found = load_file(file)
    found["model.norm.weight"] = np.zeros(33, np.float32)
    found["model.layers.1.mlp.up_proj.bias"] = np.zeros(48, np.int8)
    save_file(found, file)
    with pytest.raises(ModelFileError, match="tensors and configuration do not match") as error:
        models.load(sharded)
    assert str(error.value).splitlines()[1:] == [
        "  model.layers.1.mlp.up_proj.bias: is int8, but layer_1/mlp/up/bias is float32",
        "  model.norm.weight: has shape (33,), but norm/scale needs (32,)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: is not a JSON object"),
        ("{}", "model_type None is not one of"),
        ('{"model_type": "t5"}', "model_type 't5' is not one of .*'bert', .*'gemma'"),
        ('{"model_type": ["llama"]}', "model_type .* is not one of"),
        ('{"model_type": "llama"}', "has no vocab_size"),
    ],
)
def test_settings_that_are_refused(sharded, text, message):
    (sharded / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=message):
        models.load(sharded)


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_sizes_beyond_the_files(sharded, name):
    """They are refused before a model of that size is created."""
    edit(sharded / "config.json", lambda settings: settings.update({name: 10**9}))
    with pytest.raises(ModelFileError, match=f"{name} is 1000000000, but the files contain only"):
        models.load(sharded)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        models.load(tmp_path)
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model\.bin is a pickle, which is never read"
    ):
        models.load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_as_stored_or_as_asked_for(tmp_path, dtype):
    wide = load("llama")
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), wide.params)
    models.save(tmp_path, dataclasses.replace(wide, params=narrow))
    read = models.load(tmp_path)
    assert read.config.dtype == read.config.param_dtype == read.settings["dtype"] == dtype
    same(read.params, narrow)
    wider = models.load(tmp_path, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wider.params)} == {np.dtype("float32")}
    with pytest.raises(ValueError, match="dtype float64 is not one of"):
        models.load(tmp_path, dtype="float64")


@pytest.mark.parametrize("name", ["bert", "llama", "llama_tied", "qwen2"])
def test_saved_files_contain_the_tensors_of_transformers(name, tmp_path):
    """Names, shapes and values are the same, including BERT's pooler, which `Bert` lacks."""
    model = load(name, scan=name == "qwen2")
    models.save(tmp_path, model)
    given, found = tensors(FIXTURES / name), tensors(tmp_path)
    header = safetensors_file.headers(tmp_path / "model.safetensors")
    assert header.metadata == {"format": "pt"}
    assert given.keys() == found.keys()
    for key, tensor in given.items():
        np.testing.assert_array_equal(found[key], tensor, strict=True)
    assert json.loads((tmp_path / "config.json").read_text()) == model.settings
    same(models.load(tmp_path).params, load(name).params)


def test_stacked_layers_are_those_of_the_single_ones():
    stacked, single = load("mistral", scan=True), load("mistral")
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked.params["layers"])
        same(layer, single.params[f"layer_{i}"])
    assert stacked.naming == single.naming == models.naming("llama")


def test_adapters_are_merged_before_a_model_is_saved(tmp_path):
    model = load("llama")
    config = lora.LoraConfig(rank=2, targets=["query"])
    ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    params = lora.init(jax.random.key(0), model.params, config, model.apply, ids)
    with pytest.raises(StructureError, match="layer_0/attention/query/kernel"):
        models.save(tmp_path, dataclasses.replace(model, params=params))
    assert not list(tmp_path.iterdir())


def test_a_directory_with_several_files_is_not_written_to(sharded):
    with pytest.raises(ModelFileError, match="contains a model in other files"):
        models.save(sharded, load("llama"))


def test_the_naming_needs_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_directory.StoredTensor, "__array__", None)
    assert models.naming_of(FIXTURES / "llama_tied") == models.naming("llama")
    assert models.naming_of(FIXTURES / "bert") == models.naming("bert")
    shutil.copy(FIXTURES / "bert" / "config.json", tmp_path)
    prefixed = {f"bert.{k}": v for k, v in load_file(FIXTURES / "bert/model.safetensors").items()}
    save_file(prefixed, tmp_path / "model.safetensors")
    found = models.naming_of(tmp_path)
    assert found == models.naming("bert").with_prefix("bert.")
    places = found.places({"layer_1/attention/query/kernel": (32, 32)})
    assert list(naming.index(places)) == ["bert.encoder.layer.1.attention.self.query.weight"]


def test_equal_models_are_one_static_argument():
    """So a function compiled for one is not compiled again for a second copy."""
    first, second = load("llama"), models.load(FIXTURES / "llama")
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert first.apply != load("llama", scan=True).apply


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\x1b[2J", "", "..", "é" * 200])
def test_a_shard_of_a_name_that_is_none(sharded, name):
    edit(sharded / INDEX, lambda index: index["weight_map"].update(x=name))
    with pytest.raises(ModelFileError, match="is not the name of a file") as error:
        models.load(sharded)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.mark.parametrize("value", [0, -1, 0.009, 1e38, 10**30, True, "10000", [10000.0], None])
@pytest.mark.parametrize("key", ["rope_theta", "factor"])
def test_rotations_that_no_model_means(sharded, key, value):
    """Each gives a clear error; of these only None, which stands for the default, is a model's."""
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} | {key: value}
    edit(sharded / "config.json", lambda config: config.update(rope_parameters=scaling))
    with pytest.raises(ModelFileError, match=f"rope: {key.removeprefix('rope_')} must be"):
        models.load(sharded)


def test_the_widest_rotations_are_finite():
    for theta in (1.0, 1e15):
        for factor in (0.01, 1e6):
            rope = Rope(theta=theta, kind="linear", factor=factor)
            cos, sin = rope.angles(np.array([0, 2**31 - 1]), 128)
            assert np.isfinite(cos).all() and np.isfinite(sin).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((name, 2**63) for name in ("num_attention_heads", "head_dim", "num_key_value_heads")),
        *((name, 10**300) for name in ("vocab_size", "rms_norm_eps", "max_position_embeddings")),
        *(("rms_norm_eps", x) for x in (0, 1e-320, -1, "1e-5", [1e-5], True)),
        ("sliding_window", 2**40),
        ("layer_types", [["full_attention"]]),
    ],
)
def test_sizes_and_settings_beyond_their_range(sharded, key, value):
    more = {"model_type": "mistral"} if key in ("sliding_window", "layer_types") else {}
    edit(sharded / "config.json", lambda config: config.update({key: value, **more}))
    with pytest.raises(ModelFileError, match=key) as error:
        models.load(sharded)
    assert str(sharded) in str(error.value) and len(str(error.value)) < 600


def test_float8_beside_float32(sharded):
    """The values of a quantization need their scales: no dtype of all tensors makes them right."""
    file = sharded / "model-00003-of-00003.safetensors"
    found, metadata = safetensors_file.read(file)
    name = next(name for name in found if name.endswith("up_proj.weight"))
    found[name] = found[name].astype(ml_dtypes.float8_e4m3fn)
    safetensors_file.write(file, found, metadata)
    for dtype in (None, "float32"):
        with pytest.raises(ModelFileError, match=r"tensors are float8_e4m3fn.*All must be float32"):
            models.load(sharded, dtype)


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [("float64", 1e300, None), ("bfloat16", 1e30, "float16"), ("float32", 1e5, "float16")],
)
def test_values_that_overflow_the_dtype(sharded, stored, value, dtype):
    file = sharded / "model-00003-of-00003.safetensors"
    found, metadata = safetensors_file.read(file)
    name = next(name for name in found if name.endswith("up_proj.weight"))
    found[name] = found[name].astype(jnp.dtype(stored))
    found[name][0, 0] = value
    safetensors_file.write(file, found, metadata)
    with pytest.raises(ModelFileError, match=rf"{name}: has values that overflow float"):
        models.load(sharded, dtype)
    if dtype is not None:
        assert np.isfinite(
            np.asarray(models.load(sharded, "float32").params["norm"]["scale"])
        ).all()
