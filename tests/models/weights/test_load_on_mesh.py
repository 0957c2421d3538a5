"""`models.load(mesh=, rules=)`: where each parameter lies, and that nothing else changes."""

import gc
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import save_file

from lora_jax import models
from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files import naming as names
from lora_jax.files.naming import Entry, Naming, reading
from lora_jax.models import hf_directory
from tests import devices
from tests.models.decoder.test_gguf import write_gguf
from tests.models.recorded import FIXTURES, load


def mesh_of(sizes, kind=AxisType.Auto):
    count = int(np.prod(list(sizes.values())))
    found = np.array(devices.some(count)).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(found, tuple(sizes), axis_types=(kind,) * len(sizes))


def specs(params):
    leaves, _ = flatten_with_paths(params)
    return {path: tuple(x.sharding.spec) for path, x in leaves.items()}


def same_values(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (x.dtype, np.asarray(x).tobytes()) == (y.dtype, np.asarray(y).tobytes())


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Read a few rows at a time, so that shards and blocks end at different rows."""
    monkeypatch.setattr(reading, "BLOCK", 3 * 32 * 4)


@pytest.mark.parametrize(
    "name, kind",
    [("bert", AxisType.Auto), ("llama", AxisType.Explicit), ("llama_tied", AxisType.Auto)],
)
def test_the_values_are_those_of_one_device(name, kind, in_small_blocks):
    for sizes in ({"fsdp": 4}, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = mesh_of(sizes, kind)
        for scan in (False, True)[: 1 if name == "bert" else 2]:
            found = models.load(FIXTURES / name, mesh=mesh, scan=scan).params
            same_values(found, load(name, scan=scan).params)
            for x in jax.tree.leaves(found):
                part = x.size // math.prod(mesh.shape[axis] for axis in x.sharding.spec if axis)
                assert {shard.data.size for shard in x.addressable_shards} == {part}


def test_the_tensor_axis_opens_and_closes_blocks_and_layers_stay_together():
    found = specs(models.load(FIXTURES / "llama", mesh=mesh_of({"fsdp": 2, "tensor": 2})).params)
    stacked = models.load(FIXTURES / "llama", mesh=mesh_of({"fsdp": 2, "tensor": 2}), scan=True)
    for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
        assert found[f"layer_0/{name}/kernel"] == ("fsdp", "tensor")
        assert specs(stacked.params)[f"layers/{name}/kernel"] == (None, "fsdp", "tensor")
    for name in ("attention/output", "mlp/down"):
        assert found[f"layer_1/{name}/kernel"] == ("tensor", "fsdp")
        assert specs(stacked.params)[f"layers/{name}/kernel"] == (None, "tensor", "fsdp")
    assert found["embedding/embedding"] == ("tensor", "fsdp")
    assert found["head/kernel"] == ("fsdp", "tensor")
    assert found["norm/scale"] == found["layer_0/mlp_norm/scale"] == ()


def test_what_does_not_divide_is_replicated():
    # 2 key-value heads of 8 on 4 devices: 16 % 4 == 0, but no device would have a whole head
    found = specs(models.load(FIXTURES / "llama", mesh=mesh_of({"tensor": 4})).params)
    assert found["layer_0/attention/key/kernel"] == (None, None)
    assert found["layer_0/attention/query/kernel"] == (None, "tensor")
    assert found["layer_0/attention/output/kernel"] == ("tensor", None)
    found = specs(models.load(FIXTURES / "llama", mesh=mesh_of({"fsdp": 3})).params)
    assert found["layer_0/mlp/down/kernel"] == found["layer_0/mlp/up/kernel"] == (None, None)
    assert found["norm/scale"] == ()


def test_own_rules_come_first_and_several_axes_go_together():
    rules = {
        "layer_0": PartitionSpec(),
        r"layer_1/mlp/.*": PartitionSpec(None, ("tensor", "fsdp")),
        "norm/scale": PartitionSpec("fsdp"),
        **models.RULES,
    }
    sizes = {"fsdp": 2, "tensor": 2}
    found = specs(models.load(FIXTURES / "llama", mesh=mesh_of(sizes), rules=rules).params)
    assert found["layer_0/mlp/up/kernel"] == (None, None)
    assert found["layer_1/mlp/up/kernel"] == (None, ("tensor", "fsdp"))
    assert found["layer_1/attention/query/kernel"] == ("fsdp", "tensor")
    assert found["norm/scale"] == ("fsdp",)
    everywhere = models.load(FIXTURES / "llama", mesh=mesh_of(sizes), rules={})
    assert set(specs(everywhere.params).values()) == {()}


def test_bert_is_sharded_too():
    found = specs(models.load(FIXTURES / "bert", mesh=mesh_of({"fsdp": 2, "tensor": 2})).params)
    assert found["layer_0/intermediate/kernel"] == ("fsdp", "tensor")
    assert found["layer_0/output/kernel"] == ("tensor", "fsdp")
    assert found["layer_0/attention/query/bias"] == ("tensor",)
    assert found["layer_0/output/bias"] == found["embeddings/type/embedding"] == ()
    assert found["embeddings/word/embedding"] == ("tensor", "fsdp")


def test_gguf_with_permuted_heads_and_another_dtype(tmp_path, in_small_blocks):
    write_gguf(tmp_path / "a.gguf", "llama")
    for scan in (False, True):
        wanted = models.load(tmp_path / "a.gguf", scan=scan).params
        mesh = mesh_of({"fsdp": 2, "tensor": 2})
        same_values(models.load(tmp_path / "a.gguf", scan=scan, mesh=mesh).params, wanted)
    half = models.load(FIXTURES / "llama", "bfloat16", mesh=mesh).params
    same_values(half, load("llama", dtype="bfloat16").params)


def test_joined_shared_and_grouped_tensors_on_a_mesh():
    """Rows of a naming that are more than one transposed tensor."""
    rows = Naming(
        (
            Entry(("h.{n}.q.weight", "h.{n}.k.weight"), "h/qk", "linear", "o i -> n i o"),
            Entry("h.{n}.v.weight", "h/v", "linear", "(h d) i -> n i h d", {"d": 2}),
            Entry("c.weight", ("a/kernel", "b/kernel"), "conv1d"),
        )
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {f"h.{n}.{x}.weight": draw(4, 6) for n in range(2) for x in "qkv"}
    tensors["c.weight"] = draw(6, 8)
    mesh = mesh_of({"fsdp": 2, "tensor": 2})

    def leaf(*shape, spec):
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)

    like = {
        "h": {
            "qk": leaf(2, 6, 8, spec=("fsdp", None, "tensor")),
            "v": leaf(2, 6, 2, 2, spec=(None, "fsdp", "tensor", None)),
        },
        "a": {"kernel": leaf(6, 4, spec=("fsdp",))},
        "b": {"kernel": leaf(6, 4, spec=(None, ("fsdp", "tensor")))},
    }
    found = names.to_tree(rows, tensors, like)
    joined = [np.concatenate([tensors[f"h.{n}.{x}.weight"] for x in "qk"]).T for n in range(2)]
    np.testing.assert_array_equal(found["h"]["qk"], np.stack(joined))
    split = [tensors[f"h.{n}.v.weight"].T.reshape(6, 2, 2) for n in range(2)]
    np.testing.assert_array_equal(found["h"]["v"], np.stack(split))
    np.testing.assert_array_equal(found["a"]["kernel"], tensors["c.weight"][:, :4])
    np.testing.assert_array_equal(found["b"]["kernel"], tensors["c.weight"][:, 4:])
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rules": {}}, "give mesh= too"),
        ({"mesh": {"fsdp": 2}}, "must be a jax.sharding.Mesh of devices"),
        ({"rules": {"up/kernel": PartitionSpec(None, None, "fsdp")}}, "layer_0/mlp/up/kernel"),
        ({"rules": {"up/kernel": ("fsdp",)}}, "must be a PartitionSpec"),
        ({"rules": {"up/kernel": PartitionSpec("fsdp", "fsdp")}}, "twice"),
        ({"rules": {"up[": PartitionSpec("fsdp")}}, "not a regular expression"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message):
    if "rules" in options and message != "give mesh= too":
        options = {"mesh": mesh_of({"fsdp": 2}), **options}
    with pytest.raises(ConfigError, match=message) as error:
        models.load(FIXTURES / "llama", **options)
    assert "\n" not in str(error.value)


def test_memory_is_the_parameters_and_one_block(tmp_path, monkeypatch):
    """NumPy's memory is traced; that it stays shows that the CPU uses it without a copy."""
    shape, dtype = (512, 1024), np.dtype(jnp.bfloat16)
    tensors = {f"h.{n}.weight": np.full(shape, n, dtype) for n in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(reading, "BLOCK", 2**16)
    stacked = Naming((Entry("h.{n}.weight", "h/kernel", "linear", "o i -> n i o"),))
    mesh = mesh_of({"fsdp": 2, "tensor": 2})
    wide = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    for sharding, to in ((None, "bfloat16"), (wide, "bfloat16"), (wide, "float32")):
        like = jax.ShapeDtypeStruct((4, *shape[::-1]), to, sharding=sharding)
        stored = hf_directory.tensors(tmp_path)
        tracemalloc.start()
        try:
            tree = jax.block_until_ready(names.to_tree(stacked, stored, {"h": {"kernel": like}}))
            gc.collect(1)  # what is young; the whole heap of the suite takes seconds
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        size = tree["h"]["kernel"].nbytes
        assert size <= kept and peak <= size + 4 * 2**16 + 2**17, (size, kept, peak)
