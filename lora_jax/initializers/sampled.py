"""Starts that are drawn at random and leave the base alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import matmul
from lora_jax.core.matrices import as_factors
from lora_jax.initializers.signature import Factors


def kaiming(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """A uniform in ±1/√fan_in, B zero; of a weight that is only looked up, A zero and B N(0, 1).

    The start of the reference implementation (Kaiming uniform with a = √5, whose bound is
    √(6/((1 + a²)·fan_in)) = 1/√fan_in): https://arxiv.org/abs/2106.09685, section 4.1. The update
    is exactly zero and the base the same array. A lookup reads one row of A: it starts as in
    PEFT, the other way round.

    >>> import jax, jax.numpy as jnp
    >>> _, a, b = kaiming(jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32)
    >>> bool(abs(a).max() <= 0.5), float(abs(b).max())
    (True, 0.0)
    """
    bound = 1 / math.sqrt(layout.fan_in(w.shape))
    a = jax.random.uniform(key, layout.a_shape(w.shape, rank), jnp.float32, -bound, bound)
    return _one_is_zero(key, w, layout, a.astype(dtype))


def gaussian(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """A normal with standard deviation 1/rank, B zero; of a weight only looked up as `kaiming`.

    PEFT's `init_lora_weights="gaussian"`. The update is exactly zero and the base the same array.

    >>> import jax, jax.numpy as jnp
    >>> _, a, b = gaussian(jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32)
    >>> a.shape, float(abs(b).max())
    ((4, 2), 0.0)
    """
    a = jax.random.normal(key, layout.a_shape(w.shape, rank), jnp.float32) / rank
    return _one_is_zero(key, w, layout, a.astype(dtype))


def orthogonal(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """A = X·Q₁/10 and B = Q₂ᵀ·Y/10 with X, Y normal and Q₁, Q₂ halves of an orthogonal matrix.

    As Q₁·Q₂ᵀ = 0, so is A·B, to rounding in `dtype`, while both factors get gradients from the
    first step. The base is the same array. https://datta0.github.io/posts/rethink-lora-init

    Raises:
      ConfigError: the rank is odd.

    >>> import jax, jax.numpy as jnp
    >>> start = jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32
    >>> _, a, b = orthogonal(*start)
    >>> bool(abs(a @ b).max() < 1e-7), bool(abs(b).max() > 0)
    (True, True)
    """
    if rank % 2:
        raise ConfigError(f"the orthogonal start needs an even rank, got {rank}")
    shape, batch = w.shape, layout.select("b", w.shape)
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*batch, rank, rank)))
    x = jax.random.normal(keys[1], (*batch, layout.fan_in(shape), rank // 2))
    y = jax.random.normal(keys[2], (*batch, rank // 2, layout.fan_out(shape)))
    a = matmul(x, q[..., 0::2, :]) / 10
    b = matmul(jnp.swapaxes(q[..., 1::2, :], -1, -2), y) / 10
    a, b = as_factors(a, b, layout, shape)
    return w, a.astype(dtype), b.astype(dtype)


def _one_is_zero(key: jax.Array, w: jax.Array, layout: Layout, a: jax.Array) -> Factors:
    """A as it is and B zero; but of a weight that is only looked up, A zero and B normal."""
    b_shape = layout.b_shape(w.shape, a.shape[-1])
    if not layout.lookup_only:
        return w, a, jnp.zeros(b_shape, a.dtype)
    return w, jnp.zeros_like(a), jax.random.normal(key, b_shape, jnp.float32).astype(a.dtype)
