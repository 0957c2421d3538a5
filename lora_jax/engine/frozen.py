"""`frozen`: an array through which no gradient flows."""

import functools

import jax
from jax import lax

from lora_jax.engine import jaxprs


def frozen(x: jax.Array) -> jax.Array:
    """Return `x`, through which no gradient flows."""
    # JAX differentiates a jitted function once for all arrays of one type, a lone primitive again
    # for each. Where nothing is differentiated, the function would only have to be compiled.
    return _frozen(x) if jaxprs.are_transformed(x) else lax.stop_gradient(x)


@functools.partial(jax.jit, inline=True)
def _frozen(x: jax.Array) -> jax.Array:
    return lax.stop_gradient(x)
