"""`apply_linear`: a function that is linear in one array, whose derivatives keep only its inputs.

JAX would differentiate `x ↦ x · dequantize(codes)` by keeping the dequantized weight for the
backward pass. Here both directions are given as functions of the codes: forward mode applies the
first to a tangent, reverse mode the second to a cotangent, and nothing else is kept.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from lora_jax.engine import jaxprs

#: `fn(constants, x)`.
Function = Callable[[Sequence[Any], jax.Array], jax.Array]


@dataclass(frozen=True)
class Linear:
    """A function that is linear in `x`, and its transpose, both `fn(constants, array)`.

    Two are equal if their keys are: JAX then traces and compiles one of them.
    """

    forward: Function = field(compare=False)
    transposed: Function = field(compare=False)
    key: Hashable

    def flip(self) -> "Linear":
        """Return the transpose, whose transpose is this one."""
        return Linear(self.transposed, self.forward, ("flip", self.key))

    def map(self, dims: Sequence[int | None]) -> "Linear":
        """Return the function of many examples: constants as `dims` say, `x` along axis 0."""
        axes = (tuple(dims), 0)
        return Linear(
            jax.vmap(self.forward, axes), jax.vmap(self.transposed, axes), ("map", *dims, self.key)
        )

    def __call__(self, *args: Any) -> jax.Array:
        """Return `forward` of the constants and, last, `x`."""
        return self.forward(args[:-1], args[-1])


_primitive = jaxprs.linear_primitive("dequantized_product")


def apply_linear(linear: Linear, constants: Sequence[Any], x: jax.Array) -> jax.Array:
    """Return `linear.forward(constants, x)`; no gradient flows to the constants."""
    return _primitive.bind(*constants, x, linear=linear)
