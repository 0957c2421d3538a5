"""`merge`: the tensors that it writes against W + scale·B·A in NumPy."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax import models, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.models.stops import stop_ids
from lora_jax.models.text.tokenizer import Tokenizer
from tests.cli import files

SCALE = files.ALPHA / files.RANK

pytestmark = pytest.mark.usefixtures("quick_compile")


def merged_weights(seed=0):
    """Return all tensors of the merged model, in float64."""
    tensors = {name: x.astype(np.float64) for name, x in files.weights().items()}
    for module, (a, b) in files.factors(seed).items():
        tensors[f"{module}.weight"] += SCALE * (a.astype(np.float64) @ b).T
    return tensors


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Write the examples' files into the working directory."""
    files.everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("adapter", ["my-adapter", "my-mlx-adapter"])
def test_the_tensors_are_the_sums(world, run, adapter):
    before = {path: path.read_bytes() for path in (world / "my-model").iterdir()}
    done = run("merge", "--model", "my-model", "--adapter", adapter, "--out", "merged")
    assert (done.status, done.err) == (0, "")
    assert "wrote merged: 4 merged weights in float32, 2 other files" in done.out
    tensors, metadata = safetensors_file.read(world / "merged" / "model.safetensors")
    wanted = merged_weights()
    assert tensors.keys() == wanted.keys() and metadata == {"format": "pt"}
    for name, value in wanted.items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-5, atol=1e-5)
        if name.removesuffix(".weight") not in files.MODULES:
            np.testing.assert_array_equal(tensors[name], files.weights()[name])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (world / "merged" / name).read_bytes() == (world / "my-model" / name).read_bytes()
    config = json.loads((world / "merged" / "config.json").read_text())
    assert files.SETTINGS.items() <= config.items()
    assert {path: path.read_bytes() for path in (world / "my-model").iterdir()} == before


def test_a_dtype_rounds_every_tensor_and_the_loss_is_told(world, run):
    words = ["merge", "-m", "my-model", "--adapter", "my-adapter", "--out", "merged"]
    done = run(*words, "--dtype", "bfloat16")
    assert done.status == 0 and "rounding error of the updates in bfloat16: median 0.00" in done.out
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    for name, value in merged_weights().items():
        assert tensors[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(tensors[name].astype(float), value, rtol=2**-8, atol=1e-6)
    assert json.loads((world / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_base_in_sixteen_bits_keeps_its_dtype_and_warns_of_a_small_update(world, run):
    files.model(world / "small", ml_dtypes.bfloat16)
    files.peft(world / "faint", config={"lora_alpha": 1e-3})
    done = run("merge", "--model", "small", "--adapter", "faint", "--out", "merged")
    assert done.status == 0
    assert done.err.startswith("warning: bfloat16 is too coarse") and done.err.count("\n") == 1
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def mixed(folder, narrow, **settings):
    """Write the model with norms in float32 and everything else in a narrow dtype."""
    files.model(folder, narrow, torch_dtype=str(np.dtype(narrow)), **settings)
    tensors = {
        name: x.astype(np.float32 if "norm" in name else narrow)
        for name, x in files.weights().items()
    }
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind", ["peft", "native", "stacked"])
@pytest.mark.parametrize("narrow", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_every_tensor_keeps_the_dtype_that_it_has_in_the_base(kind, narrow, world, run):
    before = mixed(world / "mixed", narrow)
    adapter = world / "my-adapter"
    if kind != "peft":
        pretrained = models.load(world / "mixed", scan=kind == "stacked")
        adapters = peft.load(adapter, pretrained.params, pretrained.naming)
        adapter = world / "own.safetensors"
        lora_jax.save(adapter, adapters, base=pretrained.params)
    done = run("merge", "--model", "mixed", "--adapter", adapter, "--out", "merged")
    assert (done.status, done.err) == (0, "")
    assert f" merged weights in {np.dtype(narrow)}" in done.out
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    assert {n: x.dtype for n, x in tensors.items()} == {n: x.dtype for n, x in before.items()}
    config = json.loads((world / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == str(np.dtype(narrow))
    for name, x in before.items():
        exact = x.astype(np.float64)
        if name.removesuffix(".weight") in files.MODULES:
            a, b = files.factors()[name.removesuffix(".weight")]
            exact = exact + SCALE * (a.astype(np.float64) @ b).T
            ulp = np.maximum(np.abs(exact), 1e-3) * 2.0 ** (-8 if narrow is not np.float16 else -11)
            assert (np.abs(tensors[name].astype(np.float64) - exact) <= 1.01 * ulp).all()
        else:
            assert tensors[name].tobytes() == x.tobytes()


def test_layers_of_several_dtypes_and_float64_are_written_as_they_were(world, run):
    """One layer in float32 among bfloat16, and a norm that float32 cannot hold."""
    dtypes = {"model.layers.1.": np.float32, "model.norm": np.float64}
    before = {
        name: x.astype(
            next((d for start, d in dtypes.items() if name.startswith(start)), ml_dtypes.bfloat16)
        )
        for name, x in files.weights().items()
    }
    before["model.norm.weight"] += 1e-12
    safetensors_file.write(world / "my-model" / "model.safetensors", before, {"format": "pt"})
    pretrained = models.load(world / "my-model", scan=True)
    adapters = peft.load(world / "my-adapter", pretrained.params, pretrained.naming)
    lora_jax.save(world / "stacked.safetensors", adapters, base=pretrained.params)
    words = ["merge", "--model", "my-model", "--adapter", "stacked.safetensors", "--out", "merged"]
    assert run(*words).status == 0
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    assert {n: x.dtype for n, x in tensors.items()} == {n: x.dtype for n, x in before.items()}
    for name, x in before.items():
        if name.removesuffix(".weight") not in files.MODULES:
            assert tensors[name].tobytes() == x.tobytes(), name


def test_an_adapter_trained_on_a_rounded_base_merges_into_the_exact_one(world, run):
    """A lora_jax file has checksums of the base in bfloat16; the sum is with that in float32."""
    pretrained = models.load(world / "my-model", "bfloat16")
    adapters = peft.load(world / "my-adapter", pretrained.params, pretrained.naming)
    lora_jax.save(world / "own.safetensors", adapters, base=pretrained.params)
    done = run("merge", "-m", "my-model", "--adapter", "own.safetensors", "--out", "merged")
    assert (done.status, done.err) == (0, "")
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    for name, value in merged_weights().items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-5, atol=1e-5)


OWN = (
    *("generation_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt"),
    *("tokenizer.model", "modeling_mine.py", "LICENSE", "LICENSE.txt", "preprocessor_config.json"),
)
OTHERS = (
    *("train.jsonl", "data.json", "notes.txt", "README.md", "optimizer.npz", "training_args.bin"),
    *("model.gguf", "pytorch_model.bin", "model.onnx", "run.log", "vocabulary.csv", "setup.py"),
)


def test_the_models_own_files_are_copied_and_nothing_else(world, run):
    for name in (*OWN, *OTHERS):
        (world / "my-model" / name).write_text(name)
    done = run("merge", "-m", "my-model", "--adapter", "my-adapter", "--out", "merged")
    assert done.status == 0
    own = {*OWN, "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(world / "merged")) == {*own, "config.json", "model.safetensors"}
    assert f"{len(own)} other files" in done.out
    assert (world / "merged" / "LICENSE").read_text() == "LICENSE"


def test_a_tokenizer_beside_the_adapter_replaces_the_bases(world, run):
    (world / "my-model" / "merges.txt").write_text("of the base")
    words = ["merge", "-m", "my-model", "--adapter", "my-adapter", "--out"]
    (world / "my-adapter" / "chat_template.jinja").write_text("mine")
    assert run(*words, "first").status == 0
    assert (world / "first" / "merges.txt").read_text() == "of the base"
    assert (world / "first" / "chat_template.jinja").read_text() == "mine"
    (world / "my-adapter" / "tokenizer.json").write_text("{}")
    assert run(*words, "second").status == 0
    assert (world / "second" / "tokenizer.json").read_text() == "{}"
    assert not (world / "second" / "merges.txt").exists()


def test_the_ends_of_a_gguf_models_turns_are_kept(world, run):
    """Of the files written, only generation_config.json can name the end of a turn, token 259."""
    files.gguf(world / "model.gguf", eot=259)
    done = run("merge", "-m", "model.gguf", "--adapter", "my-adapter", "--out", "merged")
    assert (done.status, done.err) == (0, "")
    assert json.loads((world / "merged" / "generation_config.json").read_text()) == {
        "eos_token_id": [258, 259]
    }
    assert stop_ids(world / "merged", Tokenizer.load(world / "merged")) == {258, 259}


@pytest.mark.filterwarnings("default")
def test_what_does_not_fit_is_left_out_if_told_so(world, run, fails):
    more = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((4, 12), "f")}
    files.peft(world / "more", extra=more)
    words = ["merge", "-m", "my-model", "--adapter", "more", "--out", "merged"]
    assert "layers.9" in fails(*words)
    done = run(*words, "--no-strict")
    assert done.status == 0 and done.err.startswith("warning: ") and "layers.9" in done.err
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    for name, value in merged_weights().items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-5, atol=1e-5)


def test_weights_without_an_adapter_that_overflow_the_dtype(world, run, fails):
    """65,504 is float16's largest number; nothing is written."""
    path = world / "my-model" / "model.safetensors"
    tensors, metadata = safetensors_file.read(path)
    tensors["model.norm.weight"][3] = 1e6
    safetensors_file.write(path, tensors, metadata)
    words = ["merge", "-m", "my-model", "--adapter", "my-adapter", "--out", "merged", "--dtype"]
    told = fails(*words, "float16")
    assert "values of norm/scale overflow float16; --dtype bfloat16 or float32" in told
    assert not (world / "merged").exists()
    assert run(*words, "bfloat16").status == 0


def test_existing_output_stands(world, run, fails):
    words = ["merge", "--model", "my-model", "--adapter", "my-adapter", "--out"]
    (world / "taken").mkdir()
    (world / "taken" / "mine.txt").write_text("mine")
    assert "taken: exists already" in fails(*words, "taken")
    assert os.listdir(world / "taken") == ["mine.txt"]
    assert run(*words, "taken", "--force").status == 0
    assert (world / "taken" / "mine.txt").read_text() == "mine"
    assert "is the base model itself" in fails(*words, "my-model", "--force")


def test_nothing_is_written_on_failure(world, fails, monkeypatch):
    words = ["merge", "--model", "my-model", "--adapter", "my-adapter", "--out", "merged"]
    monkeypatch.setattr(os, "fsync", _disk_full)
    assert "the disk is full" in fails(*words)
    assert not [path for path in world.rglob("*") if "merged" in str(path)]


def _disk_full(_):
    raise OSError(28, "No space left on device", "merged")


def test_failures(world, fails, run):
    words = ["merge", "--out", "merged", "--adapter"]
    model = ["--model", "my-model"]
    assert "no such file or directory" in fails(*words, "none", *model)
    assert "smollm2" in fails(*words, "my-adapter", "--model", "none")
    assert "not a model; pass it as --adapter" in fails(
        *words, "my-adapter", "--model", "my-adapter"
    )
    assert "not an adapter" in fails(*words, "my-model", *model)
    assert "'int8' is not one of" in fails(*words, "x", *model, "--dtype", "int8", status=2)
    assert "Missing option '--model'" in fails(*words, "my-adapter", status=2)
    other = files.peft(world / "wide")
    tensors, _ = safetensors_file.read(other / "adapter_model.safetensors")
    wide = {name: np.tile(x, (1, 2)) if "lora_A" in name else x for name, x in tensors.items()}
    safetensors_file.write(other / "adapter_model.safetensors", wide)
    assert "has shape (4, 24), needs (4, 12)" in fails(*words, other, *model)
    (world / "my-model" / "config.json").write_text("{")
    assert "not valid JSON" in fails(*words, "my-adapter", *model)
    (world / "my-model" / "config.json").write_text('{"model_type": "mamba"}')
    assert "'mamba' is not one of" in fails(*words, "my-adapter", *model)
    (world / "my-model" / "config.json").write_text(json.dumps(files.SETTINGS))
    weights = world / "my-model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors" in fails(*words, "my-adapter", *model)
    weights.unlink()
    assert "no such file" in fails(*words, "my-adapter", *model)
    assert not (world / "merged").exists()


def test_an_adapter_of_lora_jax_over_stacked_layers(world, run):
    """The file's paths show that the layers are stacked, so the base is read stacked."""
    pretrained = models.load(world / "my-model", scan=True)
    adapters = peft.load(world / "my-adapter", pretrained.params, pretrained.naming)
    lora_jax.save(world / "stacked.safetensors", adapters, base=pretrained.params)
    words = ["merge", "--model", "my-model", "--adapter", "stacked.safetensors", "--out", "merged"]
    assert run(*words).status == 0
    tensors, _ = safetensors_file.read(world / "merged" / "model.safetensors")
    for name, value in merged_weights().items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-5, atol=1e-5)
