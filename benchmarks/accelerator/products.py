"""Single products of a branch: the base's, the skinny ones of both passes, and sums of both."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.accelerator.size import Size
from benchmarks.accelerator.timing import seconds_per_call


def rows(size: Size, rank: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Return (name, a function that measures it) for outputs of the width and of the ffn."""
    for columns in (size.width, size.ffn):
        for name, make in _PRODUCTS.items():
            yield f"{name}, N={columns}, r={rank}", partial(_time, make, size, columns, rank)


def _time(make: Callable, size: Size, columns: int, rank: int) -> dict[str, Any]:
    tokens, width = size.tokens, size.width
    shapes = {
        "x": (tokens, width),
        "w": (width, columns),
        "a": (width, rank),
        "b": (rank, columns),
        "h": (tokens, rank),
        "dy": (tokens, columns),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    run = jax.jit(make)
    call = lambda: run(arrays)
    return {"us": 1e6 * seconds_per_call(call, size.repeats, 4 * size.steps)}


def _dot(x: jax.Array, y: jax.Array, summed: tuple[int, int], dtype: Any) -> jax.Array:
    numbers = (((summed[0],), (summed[1],)), ((), ()))
    return lax.dot_general(x, y, numbers, preferred_element_type=dtype)


def _sum(v: dict[str, jax.Array], dtype: Any) -> jax.Array:
    base = _dot(v["x"], v["w"], (1, 0), jnp.bfloat16)
    update = _dot(v["h"], v["b"], (1, 0), dtype)
    return (base.astype(dtype) + update).astype(jnp.bfloat16)


def _concatenated(v: dict[str, jax.Array]) -> jax.Array:
    x, w = lax.concatenate([v["x"], v["h"]], 1), lax.concatenate([v["w"], v["b"]], 0)
    return _dot(x, w, (1, 0), jnp.bfloat16)


_PRODUCTS: dict[str, Callable] = {
    "x·W": lambda v: _dot(v["x"], v["w"], (1, 0), jnp.bfloat16),
    "x·W + h·B, sum in bfloat16": lambda v: _sum(v, jnp.bfloat16),
    "x·W + h·B, sum in float32": lambda v: _sum(v, jnp.float32),
    "[x | h]·[W ; B]": _concatenated,
    "h = x·A": lambda v: _dot(v["x"], v["a"], (1, 0), jnp.bfloat16),
    "h = x·A, float32": lambda v: _dot(v["x"], v["a"], (1, 0), jnp.float32),
    "h·B": lambda v: _dot(v["h"], v["b"], (1, 0), jnp.bfloat16),
    "dh = dy·Bᵀ": lambda v: _dot(v["dy"], v["b"], (1, 1), jnp.bfloat16),
    "dh = dy·Bᵀ, float32": lambda v: _dot(v["dy"], v["b"], (1, 1), jnp.float32),
    "dA = xᵀ·dh": lambda v: _dot(v["x"], v["h"], (0, 0), jnp.bfloat16),
    "dAᵀ = dhᵀ·x": lambda v: _dot(v["h"], v["x"], (0, 0), jnp.bfloat16),
    "dB = hᵀ·dy": lambda v: _dot(v["h"], v["dy"], (0, 0), jnp.bfloat16),
    "dBᵀ = dyᵀ·h": lambda v: _dot(v["dy"], v["h"], (0, 0), jnp.bfloat16),
}
