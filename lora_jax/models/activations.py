"""Activations under the names that config.json has for them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def gelu(x: jax.Array) -> jax.Array:
    """Return x·Φ(x), exactly."""
    # `jax.nn.gelu(approximate=False)` uses erfc, which takes three times as long on CPU.
    return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x·σ(1.702·x), which CLIP has."""
    return x * jax.nn.sigmoid(1.702 * x)


def laplace(x: jax.Array) -> jax.Array:
    """Return the normal distribution function with mean √½ and deviation √(1 / 4π), as MEGA."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * np.sqrt(2.0).astype(x.dtype))))


_gelu_tanh = partial(jax.nn.gelu, approximate=True)
#: All that transformers has, but for those with parameters.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
