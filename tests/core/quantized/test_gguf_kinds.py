"""GGUF's kinds against the package `gguf`: values of any bytes, and codes of values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array, quantize_array
from lora_jax.files.disk import gguf_blocks

# where the float16 scales are in a block
HALVES = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
HALVES |= {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q6_K": (208,)}
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
ROWS, WIDTH = 24, 512
# float16 at its limits: the largest, the smallest normal and subnormal numbers, both zeros
EXTREME = np.array([65504, -65504, 6.104e-5, -6.104e-5, 6e-8, -6e-8, 6.098e-5, 0, -0.0], "e")


def random_blocks(name):
    """Return rows of random bytes, whose scales are finite and often extreme."""
    rng = np.random.default_rng(0)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (ROWS * WIDTH // block, size), np.uint8)
    for start in HALVES[name]:
        scales = blocks[:, start : start + 2].copy().view(np.float16)
        scales[~np.isfinite(scales)] = 1
        scales[::2] = rng.choice(EXTREME, scales[::2].shape)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(ROWS, -1)


def fields_of(name, rows):
    """Return the fields of rows of a file's bytes."""
    found = gguf_blocks.fields(name, (ROWS, WIDTH), rows.reshape(-1), lambda x: x)
    return {field: np.asarray(x) for field, x in found.items()}


def same_bits(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("name", HALVES)
def test_values_of_any_bytes_are_those_of_gguf(name, optimized):
    """To the bit, compiled too, where XLA fuses products and sums, and along any axis."""
    rows = random_blocks(name)
    fields = fields_of(name, rows)
    assert sum(x.nbytes for x in fields.values()) == rows.nbytes
    last = QuantizedWeight(fields, name.lower(), -1, jnp.dtype("float32"))
    turned = {field: np.ascontiguousarray(x.T.reshape(-1, 4, 6)) for field, x in fields.items()}
    first = QuantizedWeight(turned, name.lower(), -3, jnp.dtype("float32"))
    assert last.shape == (ROWS, WIDTH) and first.shape == (WIDTH, 4, 6)
    assert math.isclose(last.format.bits(WIDTH), 8 * rows.nbytes / (ROWS * WIDTH))
    want = dequantize(rows, GGMLQuantizationType[name])
    compiled = jax.jit(lambda *weights: [dequantize_array(w) for w in weights])(last, first)
    same_bits(compiled[0], want)
    same_bits(compiled[1], np.ascontiguousarray(want.T.reshape(WIDTH, 4, 6)))


@pytest.mark.parametrize("name", WRITTEN)
def test_codes_of_values_are_those_of_gguf(name, optimized):
    values = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    values[1], values[2], values[3] = 0, -0.25, np.abs(values[3])
    values[4] *= 1e-6  # subnormal scales
    values[5, ::2], values[5, 1::2] = 1.5, -1.5  # two of the largest absolute value
    values[6] = np.round(4 * values[6]) / 8  # halfway between codes
    want = fields_of(name, quantize(values, GGMLQuantizationType[name]))
    both = jax.jit(lambda x, y: [quantize_array(v, name.lower(), a) for v, a in ((x, -1), (y, 0))])
    got, turned = both(values, values.T)
    assert got.fields.keys() == want.keys()
    jax.tree.map(same_bits, dict(got.fields), want)
    jax.tree.map(lambda x, y: same_bits(x.T, y), dict(turned.fields), want)


def as_stored(name, weight):
    """Return the bytes of a file, from fields with the blocks along the last axis."""
    block = weight.format.block
    parts = [
        np.asarray(weight.fields[field]).reshape(ROWS * WIDTH // block, -1).view(np.uint8)
        for field in gguf_blocks.FIELDS[name]
    ]
    return np.concatenate(parts, 1).reshape(ROWS, -1)


# what llama.cpp's searches with all of their candidates leave of these numbers
LLAMA_CPP = [
    ("Q4_K", 0.07277),
    pytest.param("Q5_K", 0.03686, marks=pytest.mark.slow),
    ("Q6_K", 0.01785),
]


@pytest.mark.parametrize(("name", "error"), LLAMA_CPP)
def test_k_quants_are_written_nearly_as_well_as_by_llama_cpp(name, error):
    values = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    values[0], values[1, :256], values[2] = 0, 0.3, -np.abs(values[2])
    values[3, 7] = 1000  # among small numbers
    encode = jax.jit(lambda values: quantize_array(values, name.lower(), -1))
    weight = encode(values)
    got = dequantize(as_stored(name, weight), GGMLQuantizationType[name])
    relative = lambda got, want: np.linalg.norm(got - want) / np.linalg.norm(want)
    assert relative(got[4:], values[4:]) < 1.01 * error
    assert not got[0].any() and relative(got[1, :256], values[1, :256]) < 1e-3
    assert relative(got[2], values[2]) < 1.2 * error
    assert relative(got[3], values[3]) < 0.023  # 0.0226 if that number alone were kept
    again = dequantize(as_stored(name, encode(got)), GGMLQuantizationType[name])
    assert (abs(again - got) > 1e-6 * abs(got)).mean() < 0.02  # most runs find their scale again
    assert relative(again, got) < 0.1 * error
