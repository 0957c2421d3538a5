"""Floating-point operations of a program, counted in its jaxpr.

XLA's own count takes the body of a loop once, whatever its length, and knows nothing of kernels
that it did not generate; a jaxpr has the lengths of all scans.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from lora_jax.engine.jaxprs import open_jaxpr, trace


def flops_of_step(step: Callable[..., Any], *args: Any) -> int | None:
    """Count the operations of a function compiled by `jax.jit`; None for any other function.

    The trace is the one that the first call uses too.
    """
    if not hasattr(step, "trace"):
        return None
    return flops(step.trace(*args).jaxpr)


def flops(jaxpr: Any) -> int:
    """Count the operations of all products of a jaxpr, over all devices.

    A product of `[m, k]` and `[k, n]` has 2·m·k·n; elementwise operations do not count. What is
    computed again in the backward pass (remat) counts again, so these are the operations of the
    hardware, not those of the model alone. The largest branch of a `cond` counts, and one pass of a
    `while` loop, whose length is not known.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((3, 3))
    >>> flops(jax.make_jaxpr(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, None, 5))(x))
    270
    """
    return sum(map(_of_equation, open_jaxpr(jaxpr)[0].eqns))


def _of_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](eqn)
    if name == "cond":
        return max(map(flops, params["branches"]))
    inside = sum(map(flops, _inner(params)))
    if name == "scan":
        return inside * params["length"]
    if name == "shard_map":  # its body is what one device does
        return inside * params["mesh"].size
    if name == "pallas_call":
        return inside * math.prod(params["grid_mapping"].grid)
    return inside


def _inner(params: Any) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if hasattr(open_jaxpr(x)[0], "eqns"):
                yield x


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * (kernel.size // outputs)


def _ragged_dot(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    if set(numbers.lhs_ragged_dimensions) & set(contracted):  # each group has its own part of k
        out_size = out.size // eqn.invars[2].aval.size
    else:
        out_size = out.size
    return 2 * out_size * math.prod(lhs.shape[i] for i in contracted)


def _dequantized_product(eqn: Any) -> int:
    program, _ = trace(eqn.params["linear"], *(x.aval for x in eqn.invars))
    return flops(program)


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "dequantized_product": _dequantized_product,
}
