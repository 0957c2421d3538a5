"""What an initializer is, and how one of a matrix serves weights of any layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.matrices import as_factors, from_matrices, map_matrices
from lora_jax.core.quantized.coding import Coding, coding_of
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.sharding.meshes import reshard_like

#: `(w', a, b)`: the base weight to keep (`w` itself if it stays as it is), A and B. `w'` may be
#: quantized; it stands for a weight of `w`'s shape and dtype.
InitialValues = tuple[Any, jax.Array, jax.Array]

#: `initializer(key, w, layout, rank, scale, dtype) -> (w', a, b)`, with A `[*batch, *in, rank]` and
#: B `[*batch, rank, *out]` in `dtype`, and `w'` of `w`'s shape and dtype. `init` may call it on
#: tracers: under `jit`, and for shapes without values.
Initializer = Callable[[jax.Array, jax.Array, Layout, int, float, Any], InitialValues]

#: `(key, w, rank, scale, dtype) -> (w', a, b)` for a matrix `w` of shape `[fan_in, fan_out]`. The
#: results may be wider than `w` and `dtype`.
MatrixInitializer = Callable[[jax.Array, jax.Array, int, jax.Array, Any], InitialValues]


def apply_per_matrix(
    initializer: MatrixInitializer,
    key: jax.Array,
    w: Any,
    layout: Layout,
    rank: int,
    scale: Any,
    dtype: Any,
) -> InitialValues:
    """Initialize each matrix of a weight: A and B in `dtype`, w' in the weight's own dtype.

    The base that is made of a quantized weight is quantized like it.

    Raises:
      ConfigError: the weight is quantized in a kind that cannot be written.
    """
    coding = None
    if is_quantized(w):
        coding = coding_of(w, True, 'use init="kaiming", which leaves the base as it is')
        w = dataclasses.replace(w, dtype=jnp.dtype(jnp.float32))
    return _apply(initializer, key, w, layout, rank, scale, dtype, coding)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 6, 7))
def _apply(
    initializer: MatrixInitializer,
    key: jax.Array,
    w: Any,
    layout: Layout,
    rank: int,
    scale: jax.Array,
    dtype: Any,
    coding: Coding | None,
) -> InitialValues:
    w = w.dequantize() if coding else w

    def one(key: jax.Array, matrix: jax.Array) -> InitialValues:
        base, a, b = initializer(key, matrix, rank, scale, dtype)
        return base.astype(w.dtype), a.astype(dtype), b.astype(dtype)

    base, a, b = map_matrices(one, key, layout, w)
    base = reshard_like(from_matrices(base, layout, w.shape), w)
    return coding.encode(base) if coding else base, *as_factors(a, b, layout, w.shape)


def widen(w: jax.Array) -> jax.Array:
    """Return `w` in float32, or in float64 if that is its dtype."""
    return w.astype(accumulator(w.dtype))


def require_positive(scale: Any) -> None:
    """Raise a ConfigError unless the scale is positive; a traced scale cannot be checked."""
    if not isinstance(scale, jax.core.Tracer) and not scale > 0:
        raise ConfigError(
            f"this initializer divides by the scale, so the scale must be positive, got {scale}"
        )
