"""The checksum of a base: it moves with every bit, and does not gather a sharded leaf."""

import contextlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.files.disk import fingerprint, safetensors_file

W = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
PRINT = re.compile(r"float32\[8,12\]:mix_[0-9a-f]{16}")


def checksum(x):
    return fingerprint.fingerprint({"x": x})["x"]


def older(x):
    """The checksum of older releases, from its definition in whole numbers."""
    words = [int(word) for word in np.asarray(x).reshape(-1).view(np.uint32)]
    weighted = sum(word * ((i * 2654435761 % 2**32) | 1) for i, word in enumerate(words))
    return f"float32[8,12]:{sum(words) % 2**32:08x}{weighted % 2**32:08x}"


def test_its_form():
    assert PRINT.fullmatch(checksum(W))
    assert checksum(jnp.asarray(W)) == checksum(W)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool", "complex64"])
def test_every_bit_moves_it(dtype):
    x = np.asarray(jnp.asarray(W[:2, :3]).astype(dtype))
    bits = x.view(np.uint8).copy()
    seen = {checksum(x)}
    changes = [1] if dtype == "bool" else [1 << bit for bit in range(8)]
    for i in range(bits.size):
        for change in changes:
            bits.reshape(-1)[i] ^= change
            seen.add(checksum(bits.view(x.dtype)))
            bits.reshape(-1)[i] ^= change
    assert len(seen) == 1 + bits.size * len(changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: -w,
        np.abs,
        lambda w: np.where(np.arange(12) == 3, -w, w),  # a negated column
        lambda w: np.where(np.arange(8)[:, None] < 2, -w, w),
        lambda w: w[::-1],
        lambda w: w[:, ::-1],
        lambda w: np.roll(w, 1, 0),
        lambda w: np.roll(w, 1, 1),
        lambda w: w.T.reshape(8, 12),
        lambda w: np.sort(w),
    ],
)
def test_changes_of_many_elements(change):
    got = change(W)
    assert got.shape == W.shape and checksum(np.ascontiguousarray(got)) != checksum(W)


def test_random_even_numbers_of_signs():
    rng, seen = np.random.default_rng(1), {checksum(W)}
    for _ in range(50):
        signs = rng.permutation(np.repeat([-1, 1], W.size // 2)).reshape(W.shape)
        seen.add(checksum((W * signs).astype(np.float32)))
    assert len(seen) == 51


def test_zeros_in_other_places():
    eye = np.eye(8, 12, dtype=np.float32)
    assert len({checksum(np.roll(eye, i, 1)) for i in range(12)}) == 12


@pytest.mark.parametrize("kinds", ["Explicit Explicit", "Auto Auto", "Explicit Auto"])
@pytest.mark.parametrize("spec", [P("m", "n"), P(None, "m"), P(("m", "n"), None), P()])
def test_sharded(kinds, spec):
    types = tuple(getattr(AxisType, kind) for kind in kinds.split())
    mesh = jax.make_mesh((2, 2), ("m", "n"), axis_types=types)
    x = jax.device_put(W, NamedSharding(mesh, spec))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            assert checksum(x) == checksum(W)


def test_empty_scalar_and_on_the_host():
    assert checksum(np.zeros((3, 0), np.float32)) != checksum(np.zeros((0, 3), np.float32))
    assert checksum(np.float32(0.0)) != checksum(np.float32(-0.0))
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    assert checksum(jax.device_put(W, host)) == checksum(W)


def test_a_sharded_leaf_is_not_gathered():
    mesh = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))
    stacks = [P("m"), P(None, "m"), P(None, None, "m")]
    cases = [(W.shape, spec) for spec in stacks[:2]] + [((4, 8, 8), spec) for spec in stacks]
    for shape, spec in cases:
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        program = fingerprint.mixed.lower(x).compile().as_text()
        moved = re.findall(r"= u32\[([\d,]*)\]\S* all-[a-z]+\(", program)
        assert len(moved) == 2  # of the two sums, one number of each device
        assert all(math.prod(map(int, sizes.split(","))) == 4 for sizes in moved)
        largest = max(int(n) for n in re.findall(r"u32\[(\d+)", program) or [0])
        assert largest <= 8  # a quarter of one axis at most


# --- Files with the checksum of older releases ----------------------------------------------------

BASE = {"kernel": jnp.asarray(W)}


@pytest.fixture
def old_file(tmp_path):
    params = lora_jax.init(jax.random.key(0), BASE, lora_jax.LoraConfig(rank=1))
    lora_jax.save(tmp_path / "a", params)
    tensors, header = safetensors_file.read(tmp_path / "a")
    header["base"] = json.dumps({"kernel": older(W)})
    safetensors_file.write(tmp_path / "a", tensors, header)
    return tmp_path / "a"


def test_the_older_checksum_is_what_it_was():
    assert older(W) == "float32[8,12]:a4d5893c0dfc1f86"  # printed by the release before
    assert fingerprint.fingerprint({"x": W}, weak=["x"])["x"] == older(W)


def test_an_old_file_loads_and_its_weaker_check_is_named(old_file):
    with pytest.warns(UserWarning, match="does not see an even number of changed signs"):
        adapters = lora_jax.load(old_file, BASE)
    assert adapters["kernel"].a.shape == (8, 1)


def test_an_old_file_still_refuses_other_values(old_file):
    with pytest.raises(lora_jax.AdapterFileError, match="kernel: other values"):
        lora_jax.load(old_file, {"kernel": BASE["kernel"].at[2, 3].add(1)})


@pytest.mark.parametrize("change", [jnp.negative, jnp.abs])
def test_load_refuses_changed_signs(tmp_path, change):
    params = lora_jax.init(jax.random.key(0), BASE, lora_jax.LoraConfig(rank=1))
    lora_jax.save(tmp_path / "a", params)
    with pytest.raises(lora_jax.AdapterFileError, match="kernel: other values"):
        lora_jax.load(tmp_path / "a", jax.tree.map(change, BASE))


def test_a_checksum_needs_no_memory():
    x = jax.ShapeDtypeStruct((512, 300), jnp.bfloat16)
    compiled = fingerprint.mixed.lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1000
