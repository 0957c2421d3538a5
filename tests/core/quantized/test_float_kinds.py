"""FP8, MXFP4 and zero points against ml_dtypes and the written definitions, in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array, quantize_array

decode = jax.jit(dequantize_array)
encode = jax.jit(quantize_array, static_argnums=(1, 2))


def weight(kind: str, dtype=jnp.float32, axis=-1, **fields) -> QuantizedWeight:
    arrays = {name: jnp.asarray(fields[name]) for name in KINDS[kind].fields}
    return QuantizedWeight(arrays, kind, axis, jnp.dtype(dtype))


def packed(codes: np.ndarray) -> np.ndarray:
    """Pack blocks of 4-bit codes `[..., blocks, block]` as `map_nibbles` reads them."""
    low, high = np.split(codes.astype(np.uint8), 2, -1)
    return (low | high << 4).reshape(*codes.shape[:-2], -1)


def gaussian(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_fp8_has_the_value_of_every_code():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = np.array([[1.0], [0.5]], np.float32)
    got = np.asarray(decode(weight("fp8", codes=np.stack([codes, codes]), scales=scales)))
    np.testing.assert_array_equal(got, expected * scales)
    assert np.isnan(got).sum() == 4  # two of 256 in each row
    assert (np.signbit(got[0]) == np.signbit(expected))[~np.isnan(got[0])].all()


@pytest.mark.parametrize("kind, block", [("fp8", 384), ("fp8_block", 128)])
def test_fp8_rounds_as_ml_dtypes(kind, block):
    w = gaussian(3, 384)
    w[1, :block] = 0
    got = encode(w, kind, -1)
    blocks, scales = w.reshape(3, -1, block), np.asarray(got.fields["scales"])[..., None]
    # XLA divides by a constant as it multiplies by its inverse
    np.testing.assert_array_max_ulp(scales, np.abs(blocks).max(-1, keepdims=True) / np.float32(448))
    scaled = np.clip(blocks / np.where(scales > 0, scales, 1), -448, 448)
    expected = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(w.shape)
    np.testing.assert_array_equal(got.fields["codes"], expected)
    assert not np.asarray(decode(got))[1, :block].any()


def test_mxfp4_has_the_value_of_every_code_and_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1, 2))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    got = np.asarray(decode(weight("mxfp4", codes=packed(codes), scales=scales)))
    numbers = codes.reshape(256, 32).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = numbers * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        expected = expected.astype(np.float32)
    normal = ~(np.abs(expected) < np.finfo(np.float32).tiny) | (expected == 0)
    np.testing.assert_array_equal(got[normal], expected[normal])
    assert np.isnan(got[255]).all() and np.isfinite(got[:252]).all()


def test_mxfp4_quantizes_by_the_specification():
    w = gaussian(64, 64) * np.exp2(np.arange(-32, 32, dtype=np.float32))[:, None]
    w[0, :32] = 0
    # all halfway points and numbers above the largest, in a block whose scale is one
    w[1, :32] = [*(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), 7.99, *(-x / 4 for x in range(24))]
    blocks = w.reshape(64, 2, 32).astype(np.float64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.floor(np.log2(largest, out=np.full_like(largest, -126), where=largest > 0)) - 2
    scaled = np.clip(blocks / np.exp2(np.maximum(exponent, -127)), -6, 6)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    scales = np.maximum(exponent + 127, 0).astype(np.uint8)[..., 0]
    got = encode(w, "mxfp4", -1)
    np.testing.assert_array_equal(got.fields["scales"][1:], scales[1:])
    np.testing.assert_array_equal(got.fields["codes"], packed(codes))
    assert not np.asarray(decode(got))[0, :32].any()


def test_nvfp4_quantizes_by_its_definition():
    w = gaussian(8, 64) * np.exp2(np.arange(-4, 4, dtype=np.float32))[:, None]
    w[0] = 0
    w[1, :16] = 0
    blocks = w.reshape(8, 4, 16)
    largest = np.abs(blocks).max((1, 2), keepdims=True)
    divisor = np.float32(6 * 448) / np.where(largest > 0, largest, 1)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    scales = (absmax / np.float32(6) * divisor).astype(ml_dtypes.float8_e4m3fn)
    step = scales.astype(np.float32) / divisor
    scaled = np.clip(blocks / np.where(step > 0, step, 1), -6, 6)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn)
    got = encode(w, "nvfp4", -1)
    np.testing.assert_array_max_ulp(got.fields["divisor"], divisor[..., 0])
    np.testing.assert_array_equal(got.fields["scales"], scales.view(np.uint8)[..., 0])
    np.testing.assert_array_equal(got.fields["codes"], packed(codes.view(np.uint8)))
    expected = (codes.astype(np.float32) * step).reshape(8, 64)
    np.testing.assert_array_max_ulp(np.asarray(decode(got)), expected, 2)


@pytest.mark.parametrize("kind, bits", [("int4_zero", 4), ("int8_zero", 8)])
def test_zero_points_are_of_the_written_definition(kind, bits):
    w = gaussian(4, 256) + np.float32(0.5)  # not symmetric
    w[1], w[2, :128] = np.abs(w[1]) + 1, 0
    largest = 2**bits - 1
    blocks = w.reshape(4, 2, 128)
    low = np.minimum(blocks.min(-1, keepdims=True), 0)
    high = np.maximum(blocks.max(-1, keepdims=True), 0)
    scales = ((high - low) / np.float32(largest)).astype(np.float16)
    step = np.where(scales > 0, scales, 1).astype(np.float32)
    zeros = np.clip(np.round(-low / step), 0, largest)
    codes = np.clip(np.round(blocks / step) + zeros, 0, largest)
    got = encode(w, kind, -1)
    np.testing.assert_array_equal(got.fields["scales"], scales[..., 0])
    np.testing.assert_array_equal(got.fields["zeros"], zeros[..., 0])
    expected = ((codes - zeros) * scales.astype(np.float32)).reshape(w.shape)
    np.testing.assert_array_equal(decode(got), expected)
    assert np.abs(expected - w).max() <= np.abs(scales).max()


@pytest.mark.parametrize("block", [8, 32, 96])
def test_a_block_is_what_the_scales_say(block):
    """Files have groups of 32, 64, 128 or a whole axis: any number of scales divides the codes."""
    codes = np.random.default_rng(0).integers(0, 16, (2, 96 // block, block))
    zeros = np.random.default_rng(1).integers(0, 16, (2, 96 // block, 1))
    scales = np.abs(gaussian(2, 96 // block, 1)).astype(ml_dtypes.bfloat16)
    got = weight(
        "int4_zero", codes=packed(codes), scales=scales[..., 0], zeros=zeros[..., 0].astype("u1")
    )
    assert got.block == block and got.shape == (2, 96)
    expected = (codes - zeros) * scales.astype(np.float32)
    np.testing.assert_array_equal(decode(got), expected.reshape(2, 96))


@pytest.mark.parametrize(
    "kind, bits, error",
    [
        *[("nf4_float32", 4.5, 0.0919), ("fp4", 4.5, 0.1219), ("mxfp4", 4.25, 0.1150)],
        ("nvfp4", 4.53125, 0.0946),
        *[("int4_zero", 4.1875, 0.1006), ("int8_zero", 8.1875, 0.00592)],
        *[("fp8", 8.03125, 0.0265), ("fp8_block", 8.25, 0.0257)],
    ],
)
def test_bits_and_error_of_gaussian_weights(kind, bits, error):
    w = gaussian(256, 1024)
    got = encode(w, kind, -1)
    assert got.nbytes * 8 / w.size == bits == KINDS[kind].bits(1024)
    found = np.linalg.norm(np.asarray(decode(got)) - w) / np.linalg.norm(w)
    assert found == pytest.approx(error, rel=0.01)
