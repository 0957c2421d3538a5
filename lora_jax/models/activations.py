"""Activations under the names that config.json has for them."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np


def gelu(x: jax.Array) -> jax.Array:
    """Return x·Φ(x), exactly."""
    # `jax.nn.gelu(approximate=False)` uses erfc, which takes three times as long on CPU.
    return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x·σ(1.702·x), which CLIP has."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
}
