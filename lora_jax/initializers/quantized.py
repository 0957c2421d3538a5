"""A start for a base that will be rounded: A and B take up what rounding loses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, truncated_svd
from lora_jax.initializers.rounding import nf4
from lora_jax.initializers.signature import Factors, Start, by_matrix, check_positive, widened


def loftq(quantizer: Callable[[jax.Array], jax.Array] = nf4, steps: int = 5) -> Start:
    """A start whose base is rounded and whose `scale·A·B` is fitted to what that loses.

    LoftQ, https://arxiv.org/abs/2310.08659, algorithm 1: in turn, Q = quantizer(W − scale·A·B) and
    scale·A·B = the best rank-r approximation of W − Q; the base becomes Q. The function starts
    closer to the original than the rounded weight alone, and not equal to it.

    Args:
      quantizer: a matrix `[in, out]` in float32 to its rounded values, same shape and dtype:
        `rounding.nf4`, `rounding.int8` or one of your own.
      steps: how often the two alternate, at least 1; the paper uses 1, 5 and 10.

    Returns:
      A start for `LoraConfig(init=...)`. It raises ConfigError where the scale is not positive.

    Raises:
      ConfigError: `quantizer` is no function, or `steps` no positive integer.

    >>> import jax, jax.numpy as jnp
    >>> w = jax.random.normal(jax.random.key(0), (64, 32))
    >>> start = loftq(nf4, steps=2)
    >>> q, a, b = start(jax.random.key(1), w, Layout("io"), 8, 1.0, jnp.float32)
    >>> bool(jnp.linalg.norm(w - q - a @ b) < 0.8 * jnp.linalg.norm(w - nf4(w)))
    True
    """
    if not callable(quantizer):
        raise ConfigError(f"loftq: quantizer must be a function, got {quantizer!r}")
    if not is_integer(steps) or steps < 1:
        raise ConfigError(f"loftq: steps must be a positive integer, got {steps!r}")

    def on_matrix(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any) -> Factors:
        wide = widened(w)

        def step(_: int, last: Factors) -> Factors:
            _, a, b = last
            rounded = quantizer(wide - scale * matmul(a, b)).astype(w.dtype)
            lost = wide - rounded.astype(wide.dtype)
            return rounded, *balanced(truncated_svd(lost, rank), scale)

        a, b = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
        return lax.fori_loop(0, steps, step, (w, a.astype(wide.dtype), b.astype(wide.dtype)))

    def start(
        key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
    ) -> Factors:
        check_positive(scale)
        return by_matrix(on_matrix, key, w, layout, rank, scale, dtype)

    return start
