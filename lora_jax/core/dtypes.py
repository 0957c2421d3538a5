"""Dtypes: what is floating, what to accumulate in, which of several is wider."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(*dtypes: Any) -> Any:
    """Return the dtype to add in: float32, or float64 if one of `dtypes` is."""
    return jnp.dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)


def wider(*dtypes: Any) -> Any:
    """Return the dtype with the most bytes, the first of several of that size.

    >>> import jax.numpy as jnp
    >>> wider(jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("float16"))
    dtype('float32')
    """
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Return `x` in `x.dtype`, with the values that `dtype` can hold.

    Under jit `x.astype(dtype).astype(x.dtype)` may round nothing: XLA is allowed to skip a cast
    down and up again, and on a GPU it does.

    >>> import jax.numpy as jnp
    >>> round_to(jnp.float32(1.001), jnp.bfloat16)
    Array(1., dtype=float32)
    """
    info = jnp.finfo(dtype)
    if info.bits >= jnp.finfo(x.dtype).bits:
        return x
    return lax.reduce_precision(x, info.nexp, info.nmant)


def compute_dtype(x_dtype: Any, w_dtype: Any) -> Any:
    """Return the dtype that an adapter multiplies in: the wider of activation and weight."""
    if not jnp.issubdtype(x_dtype, jnp.inexact):
        return w_dtype
    return max(x_dtype, w_dtype, key=lambda d: (jnp.issubdtype(d, jnp.complexfloating), d.itemsize))


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of floating numbers, or stands for one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
