"""A quantized base in memory: its codes, one dequantized weight at a time, and nothing kept."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.training.running.flops import flops

LAYERS = 8
FAMILIES = ("nf4", "int8", "int4", "q4_k", "fp8", "mxfp4")
#: Bits of a number: its code, and its block's scales divided by the numbers of a block; NF4 and
#: the kinds with a scale per output have 32 more per column.
BITS = {
    "nf4": 4 + 8 / 64,
    "int8": 8,
    "int4": 4 + 16 / 32,
    "q4_k": 8 * 144 / 256,
    "fp8": 8,
    "mxfp4": 4 + 8 / 32,
}


def shapes_of(width):
    wide = dict.fromkeys(("gate", "up"), (width, 2 * width))
    return dict.fromkeys("qkvo", (width, width)) | wide | {"down": (2 * width, width)}


def block(x, p):
    h = norm(x)
    q, k, v = (h @ p[name] for name in "qkv")
    scores = jnp.where(jnp.tril(jnp.ones((len(x), len(x)), bool)), q @ k.T / len(p["q"]), -1e9)
    x = x + jax.nn.softmax(scores) @ v @ p["o"]
    h = norm(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def scanned(layers, x):
    return jax.lax.scan(lambda x, p: (block(x, p), None), x, layers)[0]


def rematerialized(layers, x):
    step = jax.checkpoint(block, prevent_cse=False)
    return jax.lax.scan(lambda x, p: (step(x, p), None), x, layers)[0]


def unrolled(layers, x):
    for p in layers:
        x = block(x, p)
    return x


def of_random_codes(kind, shape, dtype="float32"):
    """Return a weight of any kind, also of those that are only read from files."""
    rng = np.random.default_rng(len(kind))
    fields = {}
    for name, field in KINDS[kind].fields.items():
        block = KINDS[kind].block or shape[-2]
        of = (*shape[:-2], field.entries(shape[-2], block), shape[-1])
        if jnp.issubdtype(field.dtype, jnp.floating):
            values = rng.uniform(1e-4, 2e-4, of).astype(field.dtype)
        else:  # codes of FP8 and scales of MXFP4 stay far below the largest
            values = rng.integers(0, 120, of).astype(field.dtype)
        fields[name] = jnp.asarray(values)
    return QuantizedWeight(fields, kind, -2, jnp.dtype(dtype))


def base_of(fn, kind, width, dtype="float32"):
    """Return `LAYERS` layers, stacked where `fn` scans; with no kind they are floating."""
    lead = () if fn is unrolled else (LAYERS,)
    make = lambda shape: (
        of_random_codes(kind, (*lead, *shape), dtype) if kind else jnp.ones((*lead, *shape), dtype)
    )
    layer = {name: make(shape) for name, shape in shapes_of(width).items()}
    return [layer] * LAYERS if fn is unrolled else layer


def step_of(fn, base, x):
    """Return a training step, the gradient of a loss, and its arguments."""
    config = lora_jax.LoraConfig(rank=4)
    base, adapters = lora_jax.split(lora_jax.init(jax.random.key(1), base, config, fn, x))
    adapted = lora_jax.lora(fn, on_dense="error")

    def step(adapters, base, x):
        loss = lambda adapters: (adapted(lora_jax.join(base, adapters), x) ** 2).mean()
        loss, grads = jax.value_and_grad(loss)(adapters)
        return loss, jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads)

    return step, (adapters, base, x)


@functools.cache
def compiled(fn, kind, width, tokens, dtype="float32"):
    step, args = step_of(fn, base_of(fn, kind, width, dtype), jnp.ones((tokens, width), dtype))
    traced = jax.jit(step).trace(*args)
    return flops(traced.jaxpr), traced.lower().compile().memory_analysis()


def check(fn, kind, width, tokens):
    """Compare with the float base: operations of products, and temporary memory."""
    wanted, of_float = compiled(fn, None, width, tokens)
    counted, memory = compiled(fn, kind, width, tokens)
    assert counted == wanted
    one_layer = 4 * sum(rows * columns for rows, columns in shapes_of(width).values())
    assert memory.temp_size_in_bytes <= of_float.temp_size_in_bytes + one_layer
    saved = of_float.argument_size_in_bytes - memory.argument_size_in_bytes
    assert saved >= (1 - 1.03 * BITS[kind] / 32) * LAYERS * one_layer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "q4_k"])
def test_a_scanned_step_takes_one_dequantized_layer_more(kind, optimized):
    check(scanned, kind, width=256, tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [scanned, unrolled])
def test_a_cpu_widens_bfloat16_one_layer_at_a_time(fn, optimized):
    """It widens a bfloat16 base at once, all layers of it, to float32."""
    (_, of_float), (_, memory) = (compiled(fn, k, 256, 16, "bfloat16") for k in (None, "int8"))
    one_layer = 4 * sum(rows * columns for rows, columns in shapes_of(256).values())
    (_, in_float32) = compiled(fn, None, 256, 16)
    assert memory.temp_size_in_bytes <= in_float32.temp_size_in_bytes + one_layer
    assert of_float.temp_size_in_bytes > in_float32.temp_size_in_bytes + (LAYERS - 2) * one_layer


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("fn", [scanned, rematerialized, unrolled])
def test_a_wide_step_takes_one_dequantized_layer_more(fn, kind, optimized):
    check(fn, kind, width=1024, tokens=64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_codes_have_the_bits_of_the_format(kind):
    weight = of_random_codes(kind, (2, 512, 256))
    assert weight.nbytes <= 1.03 * BITS[kind] / 8 * weight.size
    assert np.isfinite(weight.dequantize()).all()


@pytest.mark.parametrize("fn", [scanned, unrolled, rematerialized])
def test_nothing_floating_of_a_weights_size_is_kept(fn):
    """What the forward pass hands to the backward pass, as the leaves of its closure."""
    x = jnp.ones((16, 256))
    _, (adapters, base, _) = step_of(fn, base_of(fn, "int8", 256), x)
    adapted = lora_jax.lora(fn, on_dense="error")
    run = lambda adapters: adapted(lora_jax.join(base, adapters), x)
    _, pull_back = jax.vjp(run, adapters)
    kept = {(x.dtype.name, x.shape[-2:]) for x in jax.tree.leaves(pull_back) if x.ndim > 1}
    weights = set(shapes_of(256).values())
    assert ("int8", (256, 256)) in kept
    assert not kept & set(itertools.product(("float32", "bfloat16"), weights))
