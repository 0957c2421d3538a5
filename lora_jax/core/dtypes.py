"""Dtypes: what is floating, what to accumulate in, which of several is wider."""

from typing import Any

import jax.numpy as jnp


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


def compute_dtype(x_dtype: Any, w_dtype: Any) -> Any:
    """Return the dtype that an adapter multiplies in: the wider of activation and weight."""
    if not jnp.issubdtype(x_dtype, jnp.inexact):
        return w_dtype
    return max(x_dtype, w_dtype, key=lambda d: (jnp.issubdtype(d, jnp.complexfloating), d.itemsize))


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of floating numbers, or stands for one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
