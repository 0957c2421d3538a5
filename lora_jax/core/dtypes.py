"""Dtypes: what is floating, what to accumulate in, which of several is wider."""

from typing import Any

import jax.numpy as jnp


def accumulator(*dtypes: Any) -> Any:
    """The dtype to add in: float32, or float64 where one of `dtypes` is."""
    return jnp.dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)


def wider(*dtypes: Any) -> Any:
    """Return the dtype with the most bytes, the first of several of that size.

    >>> import jax.numpy as jnp
    >>> wider(jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("float16"))
    dtype('float32')
    """
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def compute_dtype(x_dtype: Any, w_dtype: Any) -> Any:
    """The dtype the branch multiplies in: the wider of the activation's and the view's."""
    if not jnp.issubdtype(x_dtype, jnp.inexact):
        return w_dtype
    return max(x_dtype, w_dtype, key=lambda d: (jnp.issubdtype(d, jnp.complexfloating), d.itemsize))


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of floating numbers (or stands for one)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
