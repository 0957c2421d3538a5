"""A tiny language model with a quantized base, and the same on floating numbers."""

import functools

import jax
import jax.numpy as jnp

import lora_jax as lora

KEY = jax.random.key(0)
IDS = jnp.arange(6)
CONFIG = lora.LoraConfig(rank=2)


def model(params, ids):
    """A tied table, layers in a scan with a bias, all of it quantized but the bias."""
    x = params["table"][ids]

    def layer(x, w):
        h = jnp.tanh(x @ w["up"]["kernel"] + w["up"]["bias"][None])
        return x + h @ w["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["table"].T


def loss(params, ids=IDS):
    return (lora.lora(model)(params, ids) ** 2).mean()


@functools.cache
def plain():
    """Return floating parameters."""
    shapes = {"up": {"kernel": (2, 64, 96), "bias": (2, 96)}, "down": {"kernel": (2, 96, 64)}}
    shapes = {"table": (10, 64), "layers": shapes}
    draw = lambda shape: jax.random.normal(KEY, shape) / 8
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


@functools.cache
def base():
    """Return them quantized: the table as int8, the kernels as int4."""
    kinds = {"table": "int8", "kernel": "int4"}
    return lora.quantize(plain(), kinds, model, IDS, targets=["table", "kernel"])


@functools.cache
def dense():
    """Return floating parameters that are equal to the quantized ones."""
    return lora.dequantize(base())


def adapted(params, config=CONFIG):
    """Return parameters with adapters that change the function."""
    joined = lora.init(KEY, params, config, model, IDS)
    noise = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    frozen, overlay = lora.split(joined)
    return lora.join(frozen, jax.tree.map(noise, overlay))


@functools.cache
def joined():
    """Return the quantized parameters with adapters."""
    return adapted(base())
