"""`lora-jax quantize`, and `--quantize` of the commands that read a model."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models

pytestmark = pytest.mark.usefixtures("quick_compile")
GENERATE = ("--prompt", "Hello", "--max-tokens", 5)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def test_a_written_model_has_the_codes_of_a_load(model, run, fails, tmp_path):
    out = tmp_path / "q"
    done = run("quantize", "--model", model, "--kind", "embedding=int8,mlp=none,int4", "--out", out)
    assert done.status == 0 and "1 weight in int8" in done.out and "8 weights in int4" in done.out
    table = {"embedding": "int8", "mlp": None, "all-linear": "int4"}
    loaded = models.load(model, quantize=table, scan=True)
    same(models.load(out, quantize="keep", scan=True).params, loaded.params)
    floats = models.load(out, dtype="float32", scan=True)
    same(floats.params, lora.dequantize(loaded.params))
    models.save(tmp_path / "again", loaded)  # stacked layers become the same tensors
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    formats = json.loads(run("inspect", out, "--json").out)["formats"]
    # 32 and 128 inputs in blocks of 32: 4 bits and a float16 a block; 8 bits and a float32 a row
    assert formats["int4"] == {"tensors": 8, "numbers": 24576, "bytes": 24576 * 9 // 16}
    assert formats["int8"] == {"tensors": 1, "numbers": 260 * 64, "bytes": 260 * 68}
    assert "int4" in (shown := run("inspect", out).out) and "4.50" in shown
    said = run("generate", "--model", out, "--quantize", "keep", *GENERATE)
    assert said.status == 0 and said.out, said
    assert "exists already" in fails("quantize", "-m", model, "--kind", "nf4", "--out", out)
    needs = fails("generate", "--model", out, *GENERATE)
    assert "pass --quantize keep to keep their codes, or --dtype bfloat16" in needs


@pytest.mark.parametrize(
    "given, words",
    [
        ("nf5", "--quantize: 'nf5' is not a kind; choose one of nf4"),
        ("nf4,", "--quantize 'nf4,': give a kind such as nf4, or PATTERN=KIND"),
        ("nf4,int8", "--quantize 'nf4,int8': give a kind"),
        ("mpl=int8", "--quantize: mpl selects no weight of a layer; nearest paths: "),
        ("int8_block", "with --quantize layer_0/attention/key/kernel=none,int8_block, or choose"),
    ],
)
def test_what_cannot_be_quantized(given, words, fails):
    assert words in fails("generate", "--model", "tiny", "--quantize", given, *GENERATE)


def test_a_damaged_description_is_refused(model, run, fails, tmp_path):
    run("quantize", "--model", model, "--kind", "int4", "--out", tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    good = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    for change, words in {
        ("kind", "int9"): "kind 'int9' is not one of",
        ("kind", "int8"): f"{name}: of the kind int8: codes is uint8 [128, 32], not int8",
        ("kind", "q4_1"): f"{name}: lacks {name}.mins",
        ("axis", 1): "axis 1 must be negative",
        ("axis", -3): "axis -3 is not an axis of its codes",
        ("axis", -2): "of the kind int4: scales is float16 [128, 2]",
        ("dtype", "int8"): "dtype 'int8' is not one of",
        ("dtype", None): "must have axis, dtype, kind",
    }.items():
        config = json.loads(json.dumps(good))
        described = config["quantization_config"]["weights"][name]
        key, value = change
        described[key] = value
        if value is None:
            del described[key]
        path.write_text(json.dumps(config))
        assert words in fails("generate", "-m", path.parent, "--quantize", "keep", *GENERATE)
    path.write_text(json.dumps(good | {"quantization_config": {"quant_method": "lora_jax"}}))
    assert "version None of our own format" in fails("generate", "-m", path.parent, *GENERATE)
