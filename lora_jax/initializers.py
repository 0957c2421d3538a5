"""Starting values of the factors."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import Layout


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, so that one more target changes no other's start.

    Folded from the path's SHA-256, which is the same in every process.
    """
    return jax.random.fold_in(
        key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    )


def kaiming(
    key: jax.Array, layout: Layout, shape: tuple[int, ...], rank: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """A uniform in ±1/√fan_in, `[*batch, *in, rank]`; B zero, `[*batch, rank, *out]`.

    The start of the reference implementation (Kaiming uniform with a = √5, whose bound is
    √(6/((1 + a²)·fan_in)) = 1/√fan_in): https://arxiv.org/abs/2106.09685, section 4.1.
    """
    bound = 1 / math.sqrt(layout.fan_in(shape))
    a = jax.random.uniform(key, layout.a_shape(shape, rank), jnp.float32, -bound, bound)
    return a.astype(dtype), jnp.zeros(layout.b_shape(shape, rank), dtype)


INITIALIZERS = {"kaiming": kaiming}
