"""`merge` leaf by leaf: the very tensors of `lora.merge` on the whole model, in several files."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.cli import sources
from lora_jax.files import kinds
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import reading
from lora_jax.models import hf_directory
from tests.cli import files

pytestmark = pytest.mark.usefixtures("quick_compile")
INDEX = "model.safetensors.index.json"


def read(folder):
    """Return the tensors of all files of a directory, and the files' sizes."""
    found, sizes = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, _ = safetensors_file.read(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
        sizes[path.name] = sum(x.nbytes for x in tensors.values())
    return found, sizes


def whole(base, adapter, scan=False, dtype=None):
    """Merge with the whole model in memory."""
    model = models.load(base, scan=scan, as_stored=True)
    if adapter.is_dir():
        file = peft.read_file(adapter)
        model = models.resize_for_adapter(model, file)
        adapters = peft.fit(file, model.params, model.naming)
    else:
        adapters = on_stored(adapter, model)
    merged = lora.merge(lora.join(model.params, adapters), dtype)
    if dtype is not None:
        merged = jax.tree.map(lambda x: x.astype(dtype), merged)
    stored = hf_directory.tensors(base) if base.is_dir() and dtype is None else None
    found = models.files(dataclasses.replace(model, params=merged), stored)
    return safetensors_file.decode(found["model.safetensors"], "whole")[0]


def on_stored(adapter, model):
    """Load lora_jax's adapter on a base in the dtypes of its file."""
    return lora.load(adapter, sources.as_trained(kinds.adapter(adapter), model.params))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


def mixed(folder):
    """Write a base in bfloat16 with one layer and the norms in float32."""
    files.model(folder, ml_dtypes.bfloat16, torch_dtype="bfloat16")
    wide = ("norm", "layers.1")
    tensors = {
        name: x.astype(np.float32 if any(w in name for w in wide) else ml_dtypes.bfloat16)
        for name, x in files.weights().items()
    }
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def dora(folder):
    rng = np.random.default_rng(3)
    names = {f"base_model.model.{m}.lora_magnitude_vector": files.OUT for m in files.MODULES}
    extra = {name: rng.uniform(1, 2, size).astype(np.float32) for name, size in names.items()}
    return files.peft(folder, config={"use_dora": True}, extra=extra)


def pissa(folder):
    return files.peft(folder, config={"init_lora_weights": "pissa"})


def grown(folder):
    """Write an adapter with three more tokens, whose embedding and head are trained."""
    draw = np.random.default_rng(4).normal(size=(2, 263, files.WIDTH)).astype(np.float32)
    names = ("model.embed_tokens", "lm_head")
    extra = {f"base_model.model.{n}.weight": x for n, x in zip(names, draw, strict=True)}
    return files.peft(folder, config={"modules_to_save": ["embed_tokens", "lm_head"]}, extra=extra)


def stacked(folder, base):
    """Write lora_jax's adapter of stacked layers: factors, a norm that trains, DoRA, rows."""
    model = models.load(base, scan=True)
    config = lora.LoraConfig(
        rank=2,
        targets=["query", "down"],
        train=["mlp_norm"],
        dora=True,
        layers=[1],
        rows={"embedding/embedding": [3, 5]},
    )
    ids = jax.ShapeDtypeStruct((1, 4), np.int32)
    params = lora.init(jax.random.key(0), model.params, config, model.apply, ids, ids)
    rng = np.random.default_rng(5)
    _, adapters = lora.split(params)
    drawn = lambda x: np.asarray(x) + rng.normal(size=x.shape).astype(x.dtype) * (x.size > 4)
    lora.save(folder, jax.tree.map(drawn, adapters), base=model.params)
    return folder


CASES = {
    "float32": (files.model, files.peft),
    "mixed": (mixed, files.peft),
    "dora": (mixed, dora),
    "pissa": (files.model, pissa),
    "grown": (files.model, grown),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_of_the_whole_model(case, tmp_path, run):
    make, adapt = CASES[case]
    base, adapter = make(tmp_path / "base"), adapt(tmp_path / "adapter")
    words = ["merge", "-m", base, "--adapter", adapter, "--out", tmp_path / "merged"]
    done = run(*words, "--max-shard-size", "3KB")
    assert (done.status, done.err) == (0, ""), done
    found, sizes = read(tmp_path / "merged")
    same(found, whole(base, adapter))
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())} and len(sizes) > 3
    assert list(sizes) == [
        f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)
    ]
    for name, size in sizes.items():
        held = [x for x, file in index["weight_map"].items() if file == name]
        assert size <= 3000 or len(held) == 1
    again = models.load(tmp_path / "merged", as_stored=True)
    same(safetensors_file.decode(models.files(again)["model.safetensors"], "again")[0], found)


@pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_stacked_layers_of_every_kind_of_adapter(dtype, tmp_path, run):
    base = mixed(tmp_path / "base")
    adapter = stacked(tmp_path / "a.safetensors", base)
    words = ["merge", "-m", base, "--adapter", adapter, "--out", tmp_path / "merged"]
    done = run(*words, *(["--dtype", dtype] if dtype else []))
    assert done.status == 0, done
    found, sizes = read(tmp_path / "merged")
    same(found, whole(base, adapter, scan=True, dtype=dtype))
    assert list(sizes) == ["model.safetensors"]
    model = models.load(base, scan=True, as_stored=True)
    params = lora.join(model.params, on_stored(adapter, model))
    _, errors = lora.merge(params, dtype, return_error=True)
    worst = max(errors, key=errors.get)
    assert f"maximum {errors[worst]:.2g} ({worst})" in done.out, errors


def test_gguf_in_several_files(tmp_path, run):
    base, adapter = files.gguf(tmp_path / "base.gguf"), files.peft(tmp_path / "adapter")
    words = ["merge", "-m", base, "--adapter", adapter, "--out", tmp_path / "merged"]
    assert run(*words, "--max-shard-size", "9KB").status == 0
    found, sizes = read(tmp_path / "merged")
    same(found, whole(base, adapter))
    assert len(sizes) > 1


def test_another_base_is_refused_before_anything_is_written(tmp_path, fails):
    base = files.model(tmp_path / "base")
    adapter = stacked(tmp_path / "a.safetensors", base)
    tensors, metadata = safetensors_file.read(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 1
    safetensors_file.write(base / "model.safetensors", tensors, metadata)
    told = fails("merge", "-m", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert "layers/mlp/down/kernel: other values than the adapters were trained on" in told
    assert "query" not in told and not (tmp_path / "merged").exists()


def test_files_that_would_remain(tmp_path, run, fails):
    base, adapter = files.model(tmp_path / "base"), files.peft(tmp_path / "adapter")
    words = ["merge", "-m", base, "--adapter", adapter, "--force", "--out", tmp_path / "merged"]
    assert run(*words, "--max-shard-size", "9KB").status == 0
    before, _ = read(tmp_path / "merged")
    assert "contains a model in other files" in fails(*words)
    assert "contains a model in other files" in fails(*words, "--max-shard-size", "3KB")
    assert run(*words, "--max-shard-size", "9KB").status == 0  # the same files
    same(read(tmp_path / "merged")[0], before)
    for size in ("0", "5XB", "-1GB", "GB", ""):
        assert "is not a size of a file" in fails(*words, "--max-shard-size", size)


def long(folder, layers):
    """Write a base of 3 MB a layer with an adapter on each layer's largest weight."""
    width, base = 20_000, folder / f"base-{layers}"
    files.model(base, num_hidden_layers=layers, intermediate_size=width)
    tensors = {name: x for name, x in files.weights().items() if "layers" not in name}
    extra = {}
    for n in range(layers):
        layer = f"model.layers.{n}"
        for name, x in files.weights().items():
            if "layers.1" in name and "mlp." not in name:
                tensors[name.replace("model.layers.1", layer)] = x
        tensors[f"{layer}.mlp.down_proj.weight"] = np.zeros((files.WIDTH, width), np.float32)
        for name in ("gate", "up"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = np.zeros((width, files.WIDTH), np.float32)
        module = f"base_model.model.{layer}.mlp.down_proj"
        extra[f"{module}.lora_A.weight"] = np.ones((1, width), np.float32)
        extra[f"{module}.lora_B.weight"] = np.ones((files.WIDTH, 1), np.float32)
    safetensors_file.write(base / "model.safetensors", tensors, {"format": "pt"})
    adapter = files.peft(
        folder / f"adapter-{layers}", config={"r": 1, "target_modules": ["down_proj"]}
    )
    safetensors_file.write(adapter / "adapter_model.safetensors", extra, {"format": "pt"})
    return base, adapter


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch, run):
    """NumPy's memory is traced, in which the values of arrays on a CPU are too."""
    monkeypatch.setattr(reading, "BLOCK", 2**14)
    peaks = {}
    for layers in (1, 2, 8):  # the first time compiles
        base, adapter = long(tmp_path, layers)
        words = ["merge", "-m", base, "--adapter", adapter, "--out", tmp_path / f"merged-{layers}"]
        if layers > 1:
            tracemalloc.start()
        assert run(*words).status == 0
        peaks[layers] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    weight, more = 4 * files.WIDTH * 20_000, 6 * 4 * 20_012  # six more pairs of factors
    assert peaks[8] - peaks[2] < 3 * more + weight, peaks
    assert (tmp_path / "merged-8" / "model.safetensors").stat().st_size > 20e6
    assert peaks[8] < 4 * weight, peaks
