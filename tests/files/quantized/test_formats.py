"""Formats of quantized files: unusual shapes against NumPy, and files that are not right."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import ModelFileError
from lora_jax.core.quantized import nf4
from lora_jax.core.quantized.nf4_nested import dynamic_map
from lora_jax.files import quantized
from lora_jax.files.disk import safetensors_file
from lora_jax.files.quantized.groups import irregular, regular
from lora_jax.files.quantized.packing import unpack_words
from lora_jax.files.quantized.stored import dequantized
from tests.parity.quantized.test_quantized import RECORDED

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
PACKED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group"}}},
}


def numbers(seed=0):
    return np.random.default_rng(seed)


def pack(codes, bits):
    """Pack codes `[rows, n]` into int32 words: one long integer per row."""
    size = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]
    words = [row.to_bytes(4 * size, "little") for row in rows]
    return np.stack([np.frombuffer(x, "<i4") for x in words])


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_of_any_number_of_bits(bits):
    codes = numbers(bits).integers(0, 2**bits, (3, 45)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_words(pack(codes, bits), bits)[:, :45], codes)


def gptq(bits, size=64, out=32, group=32, g_idx=None, less_one=True, **changed):
    """Return the tensors of one GPTQ layer, and its values by the written definition."""
    rng = numbers(bits)
    group_of = np.arange(size) // group if g_idx is None else g_idx
    codes = rng.integers(0, 2**bits, (size, out)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, (group_of.max() + 1, out))
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    values = (codes - zeros[group_of].astype(np.float32)) * scales[group_of].astype(np.float32)
    words = pack((zeros - less_one) % 8 if bits == 3 else zeros, bits)
    if less_one and bits != 3:  # GPTQModel subtracts from whole words
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = (words.view(np.uint32) - np.uint32(ones)).view(np.int32)
    tensors = {
        "up.qweight": pack(codes.T, bits).T,
        "up.qzeros": words,
        "up.scales": scales,
        "up.g_idx": group_of.astype(np.int32),
    }
    tensors |= {f"up.{name}": x for name, x in changed.items()}
    return {name: x for name, x in tensors.items() if x is not None}, values.T


def read(tensors, config):
    return quantized.read(tensors, config, None)["up.weight"]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_of_other_bits(bits, layout):
    tensors, expected = gptq(bits, less_one=layout == "gptq")
    found = read(tensors, {**GPTQ, "bits": bits, "checkpoint_format": layout})
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert found.codes().kind == ("int8_zero" if bits == 8 else "int4_zero")
    np.testing.assert_array_equal(dequantized(found.codes()), expected)


@pytest.mark.parametrize(
    "group, without_index, block", [(32, False, 16), (32, True, 16), (-1, True, 80), (999, 1, 80)]
)
def test_the_last_group_may_be_shorter(group, without_index, block):
    changed = {"g_idx": None} if without_index else {}
    tensors, expected = gptq(4, size=80, group=group if group > 0 else 80, **changed)
    found = read(tensors, {**GPTQ, "group_size": group})
    assert found.codes().block == block and found.shape == (32, 80)
    np.testing.assert_array_equal(dequantized(found.codes()), expected)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_groups_by_activation_are_read_as_floats_only():
    g_idx = numbers().permutation(np.arange(64) // 32)
    tensors, expected = gptq(4, g_idx=g_idx)
    found = read(tensors, GPTQ)
    np.testing.assert_array_equal(np.asarray(found), expected)
    with pytest.raises(ModelFileError, match=r"up\.weight: its inputs are in groups by.*dtype="):
        found.codes()


def test_groups():
    assert regular(64, 128).block == 64 and regular(96, 64).block == 32
    assert not regular(100, 64).kept and regular(100, 64).block == 4
    assert irregular(np.repeat([0, 1], 16)).kept
    assert not irregular(np.tile([0, 1], 16)).kept


def nf4_file(size, block=64, **state):
    """Return the tensors of one NF4 layer, and its values: blocks of the flat weight."""
    rng, count = numbers(1), int(np.prod(size))
    codes = rng.integers(0, 16, count + count % 2).astype(np.uint8)
    absmax = rng.uniform(0.5, 2, -(-count // block)).astype(np.float32)
    table = np.asarray(nf4.VALUES, np.float32)
    values = table[codes[:count]] * np.repeat(absmax, block)[:count]
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": size} | state
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors = {
        "up.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "up.weight.absmax": absmax,
        "up.weight.quant_map": table,
        "up.weight.quant_state.bitsandbytes__nf4": text,
    }
    return tensors, values.reshape(size)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "shape, block, kind, kept",
    [
        ((3, 1024), 128, "nf4_nested", 1024),
        ((5, 3072), 64, "nf4_nested", 1024),  # nested blocks of 16384 numbers, which cross rows
        ((2, 192), 64, "nf4_float32", 64),  # of three scales none is shared
        ((4, 64), 32, "nf4_float32", 32),
    ],
)
def test_scales_that_are_quantized_too(shape, block, kind, kept):
    tensors, _ = nf4_file(list(shape), block, nested_blocksize=256, nested_offset=0.75)
    rng, count = numbers(2), int(np.prod(shape))
    codes = rng.integers(0, 256, count // block).astype(np.uint8)
    nested = rng.uniform(0.1, 0.3, -(-codes.size // 256)).astype(np.float32)
    tensors |= {
        "up.weight.absmax": codes,
        "up.weight.nested_absmax": nested,
        "up.weight.nested_quant_map": dynamic_map(),
    }
    absmax = dynamic_map()[codes] * np.repeat(nested, 256)[: codes.size] + np.float32(0.75)
    bits = tensors["up.weight"].ravel()
    table = np.asarray(nf4.VALUES, np.float32)[np.stack([bits >> 4, bits & 15], -1).ravel()]
    expected = (table * np.repeat(absmax, block)).reshape(shape)
    found = read(tensors, BNB)
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert (found.codes().kind, found.codes().block) == (kind, kept)
    # XLA may round a product and a sum once
    np.testing.assert_allclose(dequantized(found.codes()), expected, rtol=0, atol=2e-7)


def test_the_map_of_nested_scales_is_that_of_bitsandbytes():
    tensors, _ = safetensors_file.read(RECORDED / "bitsandbytes_nf4_nested/model.safetensors")
    found = [x for name, x in tensors.items() if name.endswith("nested_quant_map")]
    np.testing.assert_array_equal(dynamic_map(), found[0])


@pytest.mark.parametrize("shape, block", [((5, 96), 32), ((3, 24), 8), ((5, 7), None)])
def test_blocks_that_cross_rows(shape, block):
    tensors, expected = nf4_file(list(shape))
    found = read(tensors, BNB)
    assert found.shape == shape and found.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(found), expected)
    if block is None:
        with pytest.raises(ModelFileError, match=r"up\.weight: blocks of 64 numbers and rows of 7"):
            found.codes()
        return
    assert found.codes().block == block
    np.testing.assert_array_equal(dequantized(found.codes()), expected)


def test_bytes_that_a_file_calls_by_another_dtype():
    tensors, expected = nf4_file([4, 64])
    tensors["up.weight"] = tensors["up.weight"].reshape(-1).view(np.float32)
    np.testing.assert_array_equal(np.asarray(read(tensors, BNB)), expected)


E4 = np.zeros((32, 64), jnp.float8_e4m3fn)
WRONG = {
    "quant_method 'hqq' is not one of bitsandbytes, gptq": ({}, {"quant_method": "hqq"}),
    "quant_method None": ({}, {}),
    "quant_method": ({}, ["gptq"]),
    "bits 5 is not one of": ({}, {**GPTQ, "bits": 5}),
    "checkpoint_format 'marlin'": ({}, {**GPTQ, "checkpoint_format": "marlin"}),
    r"checkpoint_format \['gptq'\] is not": ({}, {**GPTQ, "checkpoint_format": ["gptq"]}),
    "blocks of 16 are not a height and a width": (
        {"up.weight": E4, "up.weight_scale_inv": np.ones((2, 4), "f4")},
        {"quant_method": "fp8", "weight_block_size": 16},
    ),
    "up.scales'?: missing": (gptq(4, scales=None)[0], GPTQ),
    r"up.qzeros'?: is int32 \[2, 3\], but": (gptq(4, qzeros=np.zeros((2, 3), "i4"))[0], GPTQ),
    r"up.scales'?: is int32": (gptq(4, scales=np.zeros((2, 32), "i4"))[0], GPTQ),
    "names groups beyond 2": (gptq(4)[0] | {"up.g_idx": np.full(64, 2, "i4")}, GPTQ),
    "64 inputs in groups of 16 have 4": (
        gptq(4)[0] | {"up.g_idx": None},
        {**GPTQ, "group_size": 16},
    ),
    "version 'gemv' of 4 bits": ({}, {"quant_method": "awq", "bits": 4, "version": "GEMV"}),
    "invalid blocksize 48": (nf4_file([4, 64], blocksize=48)[0], BNB),
    "invalid shape": (nf4_file([4, 64], shape=[4, -64])[0], BNB),
    "invalid dtype": (nf4_file([4, 64], dtype="int8")[0], BNB),
    "has 128 bytes, but": (nf4_file([4, 64], shape=[4, 65])[0], BNB),
    "not valid JSON": (
        nf4_file([4, 64])[0]
        | {"up.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)},
        BNB,
    ),
    "is not the table of nf4": (
        nf4_file([4, 64])[0] | {"up.weight.quant_map": np.zeros(16, "f4")},
        BNB,
    ),
    r"words \[32, 8\] are not a weight \[32, 65\]": (
        {
            "up.weight_packed": np.zeros((32, 8), "i4"),
            "up.weight_shape": np.array([32, 65]),
            "up.weight_scale": np.ones((32, 2), "f4"),
        },
        PACKED,
    ),
    "up.weight'?: missing": ({"up.weight_scale": np.ones((2, 2), "f4")}, PACKED),
    r"scales \[32, 3\] do not fit a weight \[32, 64\]": (
        {"up.weight": E4, "up.weight_scale": np.ones((32, 3), "f4")},
        PACKED,
    ),
    r"scales \[2, 4\] do not fit .* in blocks of \[128, 128\]": (
        {"up.weight": E4, "up.weight_scale_inv": np.ones((2, 4), "f4")},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_files_that_are_not_right(message):
    tensors, config = WRONG[message]
    tensors = {name: x for name, x in tensors.items() if x is not None}
    with pytest.raises(ModelFileError, match=message):
        np.asarray(read(tensors, config))
