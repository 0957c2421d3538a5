"""Initial values of the layers: a plain weight, or one with A and B."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.checks import is_integer
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight

#: The standard deviation of A.
A_STD = 0.02


def weight(
    key: jax.Array,
    shape: tuple[int, int],
    rank: int,
    alpha: float | None,
    *,
    use: str,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> jax.Array | LoraWeight:
    """Return W ~ N(0, 1/√in) of shape `[in, out]`, with A ~ N(0, 0.02) and B = 0 if rank > 0.

    W has `dtype`; A and B are float32.

    Raises:
      ConfigError: a size, the rank, alpha or dropout has no meaning.
    """
    check_sizes(shape)
    _check_rank(rank, shape)
    w_key, a_key = jax.random.split(key)
    w = (jax.random.normal(w_key, shape) / math.sqrt(shape[0])).astype(dtype)
    if rank == 0:
        return w
    config = LoraConfig(rank=rank, alpha=alpha, dropout=dropout)
    a = A_STD * jax.random.normal(a_key, (shape[0], rank))
    scale = jnp.full((), config.scale(rank, alpha))
    layout = Layout("io", uses=(use,))
    return LoraWeight(
        w, a, jnp.zeros((rank, shape[1])), scale, layout=layout, dropout=float(dropout)
    )


def check_sizes(sizes: tuple[int, ...]) -> None:
    """Raise a ConfigError unless all are positive integers."""
    if not all(is_integer(size) and size > 0 for size in sizes):
        raise ConfigError(f"sizes must be positive integers, got {sizes}")


def _check_rank(rank: Any, shape: tuple[int, int]) -> None:
    if not is_integer(rank) or not 0 <= rank <= min(shape):
        raise ConfigError(
            f"rank must be an integer from 0 (a plain layer) to {min(shape)}, the largest rank of "
            f"a weight {shape}; got {rank!r}"
        )
