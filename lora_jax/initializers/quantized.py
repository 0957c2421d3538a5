"""LoftQ: round the base weight, and fit A and B to what the rounding lost."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.checks import is_integer
from lora_jax.core.dtypes import round_to
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, truncated_svd
from lora_jax.initializers.rounding import nf4
from lora_jax.initializers.signature import (
    Initializer,
    InitialValues,
    apply_per_matrix,
    require_positive,
    widen,
)


def loftq(quantizer: Callable[[jax.Array], jax.Array] = nf4, steps: int = 5) -> Initializer:
    """Return an initializer that rounds the base and fits `scale·A·B` to what the rounding lost.

    LoftQ, https://arxiv.org/abs/2310.08659, algorithm 1, alternates two steps:
    Q = quantizer(W − scale·A·B), and scale·A·B = the best rank-r approximation of W − Q. The base
    becomes Q. Before training, the function is closer to the original than with the rounded weight
    alone, but not equal to it.

    Args:
      quantizer: maps a float32 matrix `[in, out]` to its rounded values, of the same shape and
        dtype: `rounding.nf4`, `rounding.int8` or a custom function.
      steps: how often the two steps alternate, at least 1; the paper uses 1, 5 and 10.

    Returns:
      An initializer for `LoraConfig(init=...)`. It raises ConfigError unless the scale is positive.

    Raises:
      ConfigError: `quantizer` is not a function, or `steps` is not a positive integer.

    >>> import jax, jax.numpy as jnp
    >>> w = jax.random.normal(jax.random.key(0), (64, 32))
    >>> initializer = loftq(nf4, steps=2)
    >>> q, a, b = initializer(jax.random.key(1), w, Layout("io"), 8, 1.0, jnp.float32)
    >>> bool(jnp.linalg.norm(w - q - a @ b) < 0.8 * jnp.linalg.norm(w - nf4(w)))
    True
    """
    if not callable(quantizer):
        raise ConfigError(f"loftq: quantizer must be a function, got {quantizer!r}")
    if not is_integer(steps) or steps < 1:
        raise ConfigError(f"loftq: steps must be a positive integer, got {steps!r}")

    def alternate(
        key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any
    ) -> InitialValues:
        wide = widen(w)

        def step(_: int, last: InitialValues) -> InitialValues:
            _, a, b = last
            rounded = round_to(quantizer(wide - scale * matmul(a, b)), w.dtype)
            return rounded, *balanced(truncated_svd(wide - rounded, rank), scale)

        a, b = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
        return lax.fori_loop(0, steps, step, (wide, a.astype(wide.dtype), b.astype(wide.dtype)))

    def initialize(
        key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
    ) -> InitialValues:
        require_positive(scale)
        return apply_per_matrix(alternate, key, w, layout, rank, scale, dtype)

    return initialize
