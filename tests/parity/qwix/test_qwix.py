"""Arrays of qwix 0.1.8 as `record_qwix.py` recorded them, in classes of the same names and fields.

Where qwix is installed, its own classes are used.
"""

import functools
import importlib.util
import json
import pathlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.weight import is_quantized

HERE = pathlib.Path(__file__).parent


@flax.struct.dataclass
class StandIn:
    """qwix/_src/core/qarray.py"""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class WithAux:
    """qwix/_src/providers/ptq.py"""

    array: Any
    how: Any = flax.struct.field(pytree_node=False, default=None)


StandIn.__name__, StandIn.__module__ = "QArray", "qwix._src.core.qarray"
WithAux.__module__ = "qwix._src.providers.ptq"
QArray = StandIn
if importlib.util.find_spec("qwix"):
    from qwix import QArray

# kind, axis, and block of each
EXPECTED = {
    "int8_per_output": ("int8", -2, 32),
    "int8_whole": ("int8", -2, 32),
    "int8_tiled_zero": ("int8_zero", -2, 16),
    "int8_bfloat16": ("int8", -2, 32),
    "int4_tiled": ("int4", -2, 32),
    "int4_zero": ("int4_zero", -2, 32),
    "int4_odd": ("int8", -2, 33),  # 4-bit codes are packed in pairs
    "int3_heads": ("int4", -3, 16),
    "int6_two_axes": ("int8", -2, 8),
    "int8_squares": ("int8", -2, 16),
    "int8_per_number": ("int8", -1, 1),
    "nf4_tiled": ("nf4_float32", -2, 32),
    "nf4_last": ("nf4_float32", -1, 32),
    "fp8": ("fp8", -2, 32),
    "mxfp8": ("fp8", -2, 32),
    "mxfp4": ("mxfp4", -2, 32),
    "nvfp4": ("nvfp4", -2, 16),
}
PER_BYTE = {name: getattr(ml_dtypes, name) for name in ("int4", "uint4", "float4_e2m1fn")}


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    with np.load(HERE / "qwix.npz") as file:
        arrays = dict(file)
    found = {}
    for name, parts in json.loads(arrays["what"].tobytes()).items():
        qtype = parts.pop("qtype")
        read = {
            part: arrays[f"{name}/{part}"].view(PER_BYTE.get(dtype) or jnp.dtype(dtype))
            for part, (dtype, _) in parts.items()
        }
        found[name] = {part: jnp.asarray(x.reshape(parts[part][1])) for part, x in read.items()}
        found[name]["qtype"] = qtype if qtype not in jnp.__dict__ else jnp.dtype(qtype)
    return found


def array(name, **changed):
    parts = {part: x for part, x in recorded()[name].items() if part != "values"}
    return QArray(**(parts | changed))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_values_are_those_of_qwix_to_the_bit(name):
    values = recorded()[name]["values"]
    bias = jnp.zeros(3)
    found = lora_jax.from_qwix({"kernel": array(name), "bias": bias})
    w = found["kernel"]
    assert found["bias"] is bias
    assert (w.kind, w.axis, w.block) == EXPECTED[name]
    assert w.shape == values.shape and w.dtype == values.dtype
    np.testing.assert_array_equal(jax.jit(lora_jax.dequantize)(w), values)


def test_boxes_shapes_and_the_auxiliary_of_a_quantized_model():
    q, expected = array("nf4_tiled"), lora_jax.from_qwix(array("nf4_tiled"))
    boxed = WithAux(jax.tree.map(lambda x: nn.Partitioned(x, (None, "tensor")), q), how="any")
    for tree in (WithAux(q), boxed):
        jax.tree.map(np.testing.assert_array_equal, lora_jax.from_qwix(tree), expected)
    shapes = lora_jax.from_qwix(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), q))
    assert is_quantized(shapes) and shapes.shape == expected.shape and shapes.axis == expected.axis
    like = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(like, shapes.fields) == jax.tree.map(like, expected.fields)
    assert lora_jax.from_qwix(expected) is expected


def test_adapters_on_them():
    params = lora_jax.from_qwix({"kernel": array("int4_tiled"), "gain": jnp.float32(2)})
    fn = lambda p, x: p["gain"] * (x @ p["kernel"])
    x = jax.random.normal(jax.random.key(0), (4, 64))
    adapted = lora_jax.init(jax.random.key(1), params, lora_jax.LoraConfig(rank=2), fn, x)
    base, factors = lora_jax.split(adapted)
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    run = jax.jit(lora_jax.lora(fn, on_dense="error"))
    kept, floats = (lora_jax.join(b, factors) for b in (base, lora_jax.dequantize(base)))
    assert is_quantized(kept["kernel"].w) and not is_quantized(floats["kernel"].w)
    np.testing.assert_allclose(run(kept, x), run(floats, x), rtol=1e-5, atol=1e-5)


def test_their_parts_are_not_adapted():
    """A scale has two axes and floating numbers, like a weight."""
    tree = {"up": {"kernel": WithAux(array("nf4_tiled"))}, "down": jnp.ones((64, 6))}
    message = r"up/kernel is a QArray of qwix: pass lora_jax\.from_qwix"
    config = lora_jax.LoraConfig(rank=2)
    with pytest.raises(ConfigError, match=message):
        lora_jax.init(jax.random.key(0), tree, config)
    with pytest.raises(ConfigError, match=message):
        lora_jax.quantize(tree, "fp8")
    lora_jax.init(jax.random.key(0), tree, lora_jax.LoraConfig(rank=2, targets=["down"]))
    lora_jax.init(jax.random.key(0), lora_jax.from_qwix(tree), config)


def test_what_cannot_be_taken_is_named():
    e5m2 = jnp.ones((32, 12), jnp.float8_e5m2)
    wrong = {
        r"a/b: qtype 'float8_e5m2' of a QArray has no kind": array(
            "fp8", qvalue=e5m2, qtype=jnp.dtype("float8_e5m2")
        ),
        r"a/b: a zero point of a QArray has no kind": array(
            "nf4_tiled", zero_point=jnp.zeros((2, 6), jnp.uint4)
        ),
        r"a/b: a scale or zero point \[3, 6\] does not divide the shape \[64, 6\]": array(
            "nf4_tiled", scale=jnp.ones((3, 6))
        ),
        r"a/b: 4-bit codes are packed in pairs, but a block has 1; use": array(
            "nf4_tiled", scale=jnp.ones((64, 6))
        ),
        r"a/b: the scales of mxfp4 should be powers of two": array(
            "mxfp4", scale=jnp.full((2, 6), 0.75)
        ),
        r"a/b: the scales of nvfp4 should be FP8 numbers": array(
            "nvfp4", scale=jnp.full((4, 6), 0.77)
        ),
    }
    for message, one in wrong.items():
        with pytest.raises(ConfigError, match=message):
            lora_jax.from_qwix({"a": {"b": one}})
