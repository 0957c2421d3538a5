"""The one signature of all starts: what `LoraConfig(init=...)` calls for each adapted weight."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.matrices import as_factors, from_matrices, map_matrices

#: The base to keep (`w` itself where the start leaves it alone), A and B.
Factors = tuple[Any, jax.Array, jax.Array]

#: `start(key, w, layout, rank, scale, dtype) -> (w', a, b)`: `w` the weight, A
#: `[*batch, *in, rank]` and B `[*batch, rank, *out]` in `dtype`, `w'` of `w`'s shape and dtype.
#: Called on tracers where `init` is: for shapes without values, and under `jit`.
Start = Callable[[jax.Array, jax.Array, Layout, int, float, Any], Factors]


#: `(key, w [fan_in, fan_out], rank, scale, dtype) -> (w', a, b)`; w' may be wider than w.
MatrixStart = Callable[[jax.Array, jax.Array, int, jax.Array, Any], Factors]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 6))
def by_matrix(
    start: MatrixStart,
    key: jax.Array,
    w: jax.Array,
    layout: Layout,
    rank: int,
    scale: jax.Array,
    dtype: Any,
) -> Factors:
    """`start` on every matrix of the weight; A and B in `dtype`, W' in the weight's own."""

    def one(key: jax.Array, matrix: jax.Array) -> Factors:
        rest, a, b = start(key, matrix, rank, scale, dtype)
        return rest.astype(w.dtype), a.astype(dtype), b.astype(dtype)

    rest, a, b = map_matrices(one, key, layout, w)
    return from_matrices(rest, layout, w.shape), *as_factors(a, b, layout, w.shape)


def widened(w: jax.Array) -> jax.Array:
    """`w` in float32, or float64 where it is."""
    return w.astype(accumulator(w.dtype))


def check_positive(scale: Any) -> None:
    """Refuse a scale whose square root is not there or is zero; a traced one is not known."""
    if not isinstance(scale, jax.core.Tracer) and not scale > 0:
        raise ConfigError(f"this start divides by the scale, which must be positive, got {scale}")
