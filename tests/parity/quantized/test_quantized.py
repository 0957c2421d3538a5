"""Files that bitsandbytes, GPTQModel, AutoAWQ, compressed-tensors and transformers wrote.

`record_quantized.py` recorded them, with what the libraries dequantize the weights to ("fp8" is
made from its written definition).
"""

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import models
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.quantized.stored import dequantized

pytestmark = pytest.mark.usefixtures("quick_compile")
RECORDED = pathlib.Path(__file__).parent / "recorded"
EXPECTED = json.loads((RECORDED / "expected.json").read_text())
CAUSAL = [name for name in EXPECTED if name != "gpt_oss"]
NOT_KEPT = "gptq_desc_act"

# kind and block of the weight that is read last
KINDS = {
    "awq": ("int4_zero", 32),
    "bitsandbytes_fp4": ("fp4", 32),  # a block of 64 is two rows
    "bitsandbytes_int8": ("int8", 32),
    "bitsandbytes_nf4": ("nf4_float32", 32),
    "bitsandbytes_nf4_nested": ("nf4_float32", 32),
    "float_blocks": ("fp8", 16),
    "float_quantized": ("fp8", 32),
    "fp8": ("fp8", 16),
    "gpt_oss": ("mxfp4", 32),
    "gptq": ("int4_zero", 32),
    "gptq_8bit": ("int8_zero", 32),
    "gptq_v2": ("int4_zero", 32),
    "int_quantized": ("int8", 32),
    "mxfp4_packed": ("mxfp4", 32),
    "nvfp4_packed": ("nvfp4", 16),
    "pack_int4": ("int4_zero", 32),
    "pack_int4_symmetric": ("int4", 16),
    "pack_int8": ("int8", 32),
}


def some(*quick, without=""):
    """All models, of which some are in the default suite: a model is a few compilations."""
    mark = lambda name: [] if name in quick else pytest.mark.slow
    return [pytest.param(name, marks=mark(name)) for name in CAUSAL if name != without]


@functools.cache
def logits() -> dict[str, np.ndarray]:
    with np.load(RECORDED / "logits.npz") as file:
        return dict(file)


def digest(values) -> str:
    values = np.asarray(values)
    values = np.ascontiguousarray(values + values.dtype.type(0))  # without negative zeros
    return hashlib.sha256(values.tobytes()).hexdigest()


def floats(tree, dtype):
    """The tree's weights in float32, rounded to a dtype before."""
    one = lambda w: jnp.asarray(dequantized(w) if is_quantized(w) else w, dtype).astype("float32")
    return jax.tree.map(one, tree, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnums=0)
def apply(fn, params, ids):
    return fn(params, ids)


@functools.cache
def float_model():
    return models.load(RECORDED / "fp8", "float32").apply


@pytest.mark.parametrize("name", EXPECTED)
def test_the_values_are_those_of_the_library_to_the_bit(name):
    dtype = EXPECTED[name]["dtype"]
    expected = EXPECTED[name]["weights"]
    read = models.read_tensors(RECORDED / name)
    assert {key: digest(read[key].astype(dtype)) for key in expected} == expected
    if name == NOT_KEPT:
        return
    kept = models.read_tensors(RECORDED / name, quantize="keep")
    assert {key: digest(floats(kept[key], dtype).astype(dtype)) for key in expected} == expected
    weight = kept[next(reversed(expected))]
    assert (weight.kind, weight.block) == KINDS[name] and weight.shape == read[key_of(kept)].shape


def key_of(kept):
    return [key for key, x in kept.items() if is_quantized(x)][-1]


@pytest.mark.parametrize("name", some("awq"))
def test_the_logits_are_those_of_transformers(name):
    dtype = EXPECTED[name]["dtype"]
    quantize = None if name == NOT_KEPT else "keep"
    kept = models.load(RECORDED / name, dtype, quantize=quantize)
    assert "quantization_config" not in kept.settings
    got = apply(float_model(), floats(kept.params, dtype), logits()["ids"])
    np.testing.assert_allclose(got, logits()[name], atol=1e-5)


@pytest.mark.parametrize("name", some("gptq", without=NOT_KEPT))
def test_a_step_and_its_adapter_are_those_of_the_float_model(name, tmp_path):
    kept = models.load(RECORDED / name, "float32", quantize="keep")
    ids = jnp.asarray(logits()["ids"])
    config = lora_jax.LoraConfig(rank=2)
    tree = lora_jax.init(jax.random.key(0), kept.params, config, kept.apply, ids)
    base, start = lora_jax.split(tree)
    start = jax.tree.map(lambda x: x + 0.02, start)
    adapted = lora_jax.lora(kept.apply, on_dense="error")

    @jax.jit
    def step(adapters, base):
        def loss(adapters):
            found = adapted(lora_jax.join(base, adapters), ids)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(found, ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        return value, grads, jax.tree.map(lambda x, g: x - 0.1 * g, adapters, grads)

    value, grads, trained = step(start, base)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (value, grads), step(start, lora_jax.dequantize(base))[:2])
    assert step(trained, base)[0] < value
    lora_jax.peft.save(
        tmp_path, lora_jax.join(base, trained), kept.naming, base=kept.params,
        config=config,
    )  # fmt: skip
    for one in (kept.params, floats(kept.params, "float32")):
        loaded = lora_jax.peft.load(tmp_path, one, kept.naming)
        jax.tree.map(np.testing.assert_array_equal, loaded, trained)
