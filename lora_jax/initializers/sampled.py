"""Initializers that draw A and B at random and leave the base weight as it is."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import matmul
from lora_jax.core.matrices import as_factors
from lora_jax.initializers.signature import InitialValues


def kaiming(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Draw A uniformly from ±1/√fan_in and set B to zero, so that the update is exactly zero.

    As in the reference implementation of https://arxiv.org/abs/2106.09685, section 4.1: Kaiming
    uniform with a = √5, whose bound is √(6/((1 + a²)·fan_in)) = 1/√fan_in. If the function only
    looks up rows of the weight (`layout.lookup_only`), A is zero and B is normal with standard
    deviation 1, as in PEFT. The base stays the same array.

    >>> import jax, jax.numpy as jnp
    >>> _, a, b = kaiming(jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32)
    >>> bool(abs(a).max() <= 0.5), float(abs(b).max())
    (True, 0.0)
    """
    bound = 1 / math.sqrt(layout.fan_in(w.shape))
    a = jax.random.uniform(key, layout.a_shape(w.shape, rank), jnp.float32, -bound, bound)
    return _with_zero_update(key, w, layout, a.astype(dtype))


def gaussian(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Draw A from a normal distribution with standard deviation 1/rank and set B to zero.

    This is PEFT's `init_lora_weights="gaussian"`. The update is exactly zero and the base stays the
    same array. A weight whose rows are only looked up is initialized as by `kaiming`.

    >>> import jax, jax.numpy as jnp
    >>> _, a, b = gaussian(jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32)
    >>> a.shape, float(abs(b).max())
    ((4, 2), 0.0)
    """
    a = jax.random.normal(key, layout.a_shape(w.shape, rank), jnp.float32) / rank
    return _with_zero_update(key, w, layout, a.astype(dtype))


def orthogonal(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Make A = X·Q₁/10 and B = Q₂ᵀ·Y/10: neither factor is zero, but their product is.

    X and Y are normal, Q₁ and Q₂ are the two halves of an orthogonal matrix. Because Q₁·Q₂ᵀ = 0,
    A·B is zero up to rounding in `dtype`, and both factors get gradients from the first step. The
    base stays the same array. https://datta0.github.io/posts/rethink-lora-init

    Raises:
      ConfigError: the rank is odd.

    >>> import jax, jax.numpy as jnp
    >>> args = jax.random.key(0), jnp.ones((4, 3)), Layout("io"), 2, 1.0, jnp.float32
    >>> _, a, b = orthogonal(*args)
    >>> bool(abs(a @ b).max() < 1e-7), bool(abs(b).max() > 0)
    (True, True)
    """
    if rank % 2:
        raise ConfigError(f'init="orthogonal" needs an even rank, got {rank}')
    shape, batch = w.shape, layout.select("b", w.shape)
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*batch, rank, rank)))
    x = jax.random.normal(keys[1], (*batch, layout.fan_in(shape), rank // 2))
    y = jax.random.normal(keys[2], (*batch, rank // 2, layout.fan_out(shape)))
    a = matmul(x, q[..., 0::2, :]) / 10
    b = matmul(jnp.swapaxes(q[..., 1::2, :], -1, -2), y) / 10
    a, b = as_factors(a, b, layout, shape)
    return w, a.astype(dtype), b.astype(dtype)


def _with_zero_update(key: jax.Array, w: jax.Array, layout: Layout, a: jax.Array) -> InitialValues:
    """Return `a` with B zero or, for a weight that is only looked up, A zero with B normal."""
    b_shape = layout.b_shape(w.shape, a.shape[-1])
    if not layout.lookup_only:
        return w, a, jnp.zeros(b_shape, a.dtype)
    return w, jnp.zeros_like(a), jax.random.normal(key, b_shape, jnp.float32).astype(a.dtype)
