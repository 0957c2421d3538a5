"""`models.load(quantize=)`: which weights become codes, which codes, and where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lora_jax as lora
from lora_jax import models
from lora_jax.core.errors import ConfigError, TargetError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized, quantize_array
from lora_jax.files.disk.safetensors_stream import InMemory
from lora_jax.files.naming import reading
from lora_jax.models import hf_directory
from lora_jax.models.tiny import tiny
from tests import devices

NAMES = ("query", "key", "value", "output", "gate", "up", "down")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Llama of widths 64 and 128 with a tied head, in float32."""
    path = tmp_path_factory.mktemp("models") / "llama"
    models.save(path, tiny(19))
    return path


@pytest.fixture(autouse=True)
def in_small_blocks(monkeypatch):
    """Read 48 rows of 64 numbers at a time, which do not divide 64 or 128 rows evenly."""
    monkeypatch.setattr(reading, "BLOCK", 48 * 64 * 4)


def leaves_of(model):
    return flatten_with_paths(model.params)[0]


def quantized(model):
    return {path: x for path, x in leaves_of(model).items() if is_quantized(x)}


def same_codes(found, w, kind, axis):
    want = quantize_array(w, kind, axis)
    assert (found.kind, found.axis, found.dtype, found.shape) == (kind, axis, w.dtype, w.shape)
    for name, x in want.fields.items():
        np.testing.assert_array_equal(found.fields[name], x, err_msg=name, strict=True)


def test_codes_are_those_of_the_whole_weight(directory):
    for kind, options in {
        "nf4": {"scan": True},
        "int8": {"dtype": "bfloat16"},  # one block per output
    }.items():
        plain = leaves_of(models.load(directory, **options))
        found = quantized(models.load(directory, quantize=kind, **options))
        assert len(found) == len(NAMES) * (1 if "scan" in options else 2)
        for path in (path for path in found if "down" in path or "key" in path):
            same_codes(found[path], plain[path], kind, -2)


def test_int4_values_by_hand(directory):
    w = np.asarray(leaves_of(models.load(directory))["layer_1/mlp/down/kernel"])
    found = quantized(models.load(directory, quantize="int4"))["layer_1/mlp/down/kernel"]
    blocks = w.reshape(4, 32, 64)  # of the 128 inputs
    step = (np.abs(blocks).max(1, keepdims=True) / np.float32(7)).astype(np.float16)
    step = step.astype(np.float32)
    want = np.clip(np.round(blocks / step), -7, 7) * step
    np.testing.assert_array_equal(found.dequantize(), want.reshape(128, 64))


def test_the_model_computes_with_the_values(directory):
    found = models.load(directory, quantize={"embedding": "int8", "all-linear": "int4"})
    assert {x.kind for x in quantized(found).values()} == {"int4", "int8"}
    same_codes(
        leaves_of(found)["embedding/embedding"],
        leaves_of(models.load(directory))["embedding/embedding"],
        *("int8", -1),
    )
    plain = jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, found.params, is_leaf=is_quantized
    )
    ids = jnp.arange(6)[None]
    got = jax.jit(lora.lora(found.apply))(found.params, ids)
    np.testing.assert_allclose(got, found.apply(plain, ids), atol=2e-5)


def test_the_first_pattern_that_selects_a_weight_decides(directory):
    table = {"layers.0.mlp": None, "mlp": "int8", r".*_1/.*(query|key)/kernel": "int4"}
    kinds = {path: x.kind for path, x in quantized(models.load(directory, quantize=table)).items()}
    assert kinds == {
        **{f"layer_1/mlp/{name}/kernel": "int8" for name in ("gate", "up", "down")},
        **{f"layer_1/attention/{name}/kernel": "int4" for name in ("query", "key")},
    }


def test_on_a_mesh_codes_are_sharded_as_the_weight(directory):
    mesh = devices.make_mesh((2, 2), ("fsdp", "tensor"))
    # 64 inputs are two blocks of 32, which fsdp=2 divides; tensor=2 divides the 128 of "down"
    plain = leaves_of(models.load(directory, mesh=mesh, scan=True))
    one = quantized(models.load(directory, quantize="int4", scan=True))
    found = quantized(models.load(directory, quantize="int4", scan=True, mesh=mesh))
    assert found.keys() == one.keys()
    for path, x in found.items():
        for name, field in x.fields.items():
            assert field.sharding.spec == plain[path].sharding.spec
            np.testing.assert_array_equal(field, one[path].fields[name], strict=True)


def test_blocks_must_divide_a_shard(directory):
    mesh = devices.make_mesh((4,), ("fsdp",))
    what = r"for the first, blocks of 32 \(int4\) do not divide the part of axis 0 of \(64, 32\)"
    with pytest.raises(ConfigError, match=what):
        models.load(directory, quantize="int4", mesh=mesh)
    # one block for all inputs: the codes are sharded, and each device has the scales of all rows
    found = quantized(models.load(directory, quantize="int8", mesh=mesh))
    down = found["layer_0/attention/query/kernel"]
    assert down.fields["codes"].sharding.spec == PartitionSpec("fsdp", None)
    assert down.fields["scales"].sharding.is_fully_replicated


def test_numbers_that_are_not_finite_are_refused(directory, tmp_path):
    weights = hf_directory.tensors(directory)
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {key: InMemory(np.asarray(x)) for key, x in weights.items()}
    values = np.array(weights[name])
    values[3, 5] = np.inf
    broken[name] = InMemory(values)
    hf_directory.write(tmp_path, hf_directory.read_config(directory), broken)
    with pytest.raises(ConfigError, match="layer_1/mlp/up/kernel: contains NaN, infinity"):
        models.load(tmp_path, quantize="int8")


@pytest.mark.parametrize(
    "quantize, error, words",
    [
        ("nf5", ConfigError, "'nf5' is not a kind; choose one of nf4"),
        (4, ConfigError, "4 must be a kind"),
        ({}, ConfigError, "must be a kind"),
        ({3: "nf4"}, ConfigError, "a pattern must be a string"),
        ({"mlp": "int9"}, ConfigError, "'mlp': 'int9' is not a kind"),
        ({"mpl": "int8"}, TargetError, "mpl selects no weight of a layer; nearest paths: .*mlp"),
        ({"norm/scale": "int8"}, TargetError, "norm/scale selects no weight of a layer"),
        ({"(": "int8"}, ConfigError, "is not a regular expression"),
        ("int8_block", ConfigError, r"12 weights .*blocks of 128 .* with quantize=\{"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(directory, quantize, error, words):
    with pytest.raises(error, match=words) as told:
        models.load(directory, quantize=quantize)
    assert "\n" not in str(told.value)
