"""`QuantizedView`: a view of a quantized base weight on its way through a program.

A product dequantizes it right where it is used, forward and backward, and keeps only the codes.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.sharding.meshes import is_on_mesh
from lora_jax.engine import jaxprs
from lora_jax.engine.frozen import frozen
from lora_jax.engine.linear import Linear, apply_linear

STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class Served:
    """What a merge-aware weight is merged to: a kind, or None for its own.

    `size` is that of the blocked axis of the whole weight.
    """

    kind: str | None
    size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedView:
    """A quantized weight, and the equations that turn its values into the view.

    `pending` are equations with one output, which take the values so far first; `others` are their
    other inputs.
    """

    weight: Any  # a QuantizedWeight, or one with merged factors: see `merge_aware`
    others: tuple[tuple[Any, ...], ...] = ()
    pending: tuple[Any, ...] = dataclasses.field(metadata=STATIC, default=())

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "QuantizedView":
        """Return the view of a whole weight, through which no gradient flows."""
        return cls(jax.tree.map(frozen, weight))

    @property
    def aval(self) -> Any:
        """The type of the view."""
        return self.pending[-1].outvars[0].aval if self.pending else self.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return tuple(self.aval.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the view."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the view."""
        return self.aval.dtype

    def apply(self, eqn: Any, *others: Any) -> "QuantizedView":
        """Return the output of an equation on this view; it is computed where it is needed."""
        return dataclasses.replace(
            self, others=(*self.others, others), pending=(*self.pending, eqn)
        )

    def dequantize(self, zero: jax.Array | None = None) -> jax.Array:
        """Return the values of the view; `zero` is as in `dequantize_array`."""
        values = self.weight.dequantize(zero)
        for eqn, others in zip(self.pending, self.others, strict=True):
            (values,) = jaxprs.bind(eqn, [values, *others])
        return values


def multiply(
    product: Callable[..., jax.Array],
    view: QuantizedView,
    x: jax.Array,
    others: Sequence[Any],
    key: Hashable,
) -> jax.Array:
    """Return `product(values, x, *others)`, and keep the codes and not the values for its gradient.

    Args:
      product: what the program computes of the weight's values, the activation and other arrays; it
        is linear in the activation.
      view: the weight.
      x: the activation.
      others: the other arrays.
      key: equal for products that compute the same.
    """
    constants, treedef = jax.tree.flatten((view, tuple(others)))
    like = jax.typeof(x)

    def forward(constants: Sequence[Any], x: jax.Array) -> jax.Array:
        view, others = jax.tree.unflatten(treedef, constants)
        return product(_values(view, after=x), x, *others)

    def transposed(constants: Sequence[Any], ct: jax.Array) -> jax.Array:
        view, others = jax.tree.unflatten(treedef, constants)
        values = _values(view, after=ct)
        return jax.linear_transpose(lambda x: product(values, x, *others), like)(ct)[0]

    return apply_linear(Linear(forward, transposed, (key, treedef, like)), constants, x)


def _values(view: QuantizedView, after: jax.Array) -> jax.Array:
    """Return the values of a view, which are not computed before the array `after` is."""
    if is_on_mesh(after) or not after.size:
        return view.dequantize()
    return view.dequantize(_zero_from(after))


def _zero_from(x: jax.Array) -> jax.Array:
    """Return 0, computed from an entry of `x`, in a way that XLA does not see through.

    On a CPU XLA drops optimization barriers early, and would dequantize every layer at once.
    """
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    first = first.real if jnp.iscomplexobj(first) else first
    bits = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    return lax.clamp(bits.dtype.type(0), bits, bits.dtype.type(0))
