"""Functions of arrays on shapes alone."""

from collections.abc import Callable
from typing import Any

import jax


def on_shapes(fn: Callable[..., Any], *args: Any) -> Any:
    """Return `fn(*args)`, or its shapes and dtypes where an array among `args` is only a shape.

    >>> import jax.numpy as jnp
    >>> on_shapes(lambda x: x + 1, jnp.zeros(2))
    Array([1., 1.], dtype=float32)
    >>> on_shapes(lambda x: x + 1, jax.ShapeDtypeStruct((2,), jnp.float32))
    ShapeDtypeStruct(shape=(2,), dtype=float32)
    """
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    return jax.eval_shape(fn, *args) if abstract else fn(*args)
