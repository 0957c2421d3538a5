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
from lora_jax.engine.quantized.linear import Linear, apply_linear

STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class Served:
    """What a merge-aware weight is merged to: a kind, or None for its own.

    `size` is that of the blocked axis of the whole weight, and `block` the size of its blocks.
    """

    kind: str | None
    size: int
    block: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What waits to be done to the values of a view: `call(values, *others)`.

    Two are equal if they compute the same: JAX then traces and compiles one of them.

    Attributes:
      call: what it is; views of quantized weights among `others` come dequantized.
      key: equal for steps that compute the same.
      shape: of the result; None where the step goes number by number, whatever the shape is.
      dtype: of the result.
    """

    call: Callable[..., jax.Array] = dataclasses.field(compare=False)
    key: Hashable
    shape: tuple[int, ...] | None
    dtype: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedView:
    """A quantized weight, and the steps that turn its values into the view.

    `pending` are those that cannot be taken on codes and scales. A product takes them where it
    dequantizes. `others` are their other inputs: arrays, or views of quantized weights.
    """

    weight: Any  # a QuantizedWeight, or a MergedWeight for the values of merge-aware adapters
    others: tuple[tuple[Any, ...], ...] = ()
    pending: tuple[Step, ...] = dataclasses.field(metadata=STATIC, default=())

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "QuantizedView":
        """Return the view of a whole weight, through which no gradient flows."""
        return cls(jax.tree.map(frozen, weight))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        shapes = [step.shape for step in self.pending if step.shape is not None]
        return shapes[-1] if shapes else self.weight.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the view."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the view."""
        return self.pending[-1].dtype if self.pending else self.weight.dtype

    @property
    def codes(self) -> jax.Array:
        """The codes of the weight."""
        return self.weight.fields[self.weight.format.codes]

    @property
    def aval(self) -> Any:
        """The type of the view: where its codes are, and varying over a mesh as they do."""
        aval = jax.typeof(self.codes)
        if self.is_movable:
            return aval.update(shape=self.shape, dtype=jnp.dtype(self.dtype))
        return jaxprs.trace(self.dequantize)[0].outvars[0].aval

    @property
    def is_movable(self) -> bool:
        """Whether the pending steps hold for any part of the weight: each goes number by number."""
        return all(step.shape is None for step in self.pending)

    @property
    def may_have_gradient(self) -> bool:
        """Whether a gradient may flow to the other inputs of the pending steps."""
        values = [x for others in self.others for x in others]
        return any(
            x.may_have_gradient if isinstance(x, QuantizedView) else _may_have_gradient(x)
            for x in values
        )

    def then(self, step: Step, *others: Any) -> "QuantizedView":
        """Return the view after a step, which is taken where the values are needed."""
        return dataclasses.replace(
            self, others=(*self.others, others), pending=(*self.pending, step)
        )

    def dequantize(self, zero: jax.Array | None = None) -> jax.Array:
        """Return the values of the view; `zero` is as in `dequantize_array`."""
        values = self.weight.dequantize(zero)
        for step, others in zip(self.pending, self.others, strict=True):
            arrays = [x.dequantize(zero) if isinstance(x, QuantizedView) else x for x in others]
            values = step.call(values, *arrays)
        return values


def _may_have_gradient(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)


def multiply(
    product: Callable[..., jax.Array],
    view: QuantizedView,
    x: jax.Array,
    others: Sequence[Any],
    key: Hashable,
    tie: str | None,
) -> jax.Array:
    """Return `product(values, x, *others)`, and keep the codes and not the values for its gradient.

    Args:
      product: what the program computes of the weight's values, the activation and other arrays; it
        is linear in the activation.
      view: the weight.
      x: the activation.
      others: the other arrays.
      key: equal for products that compute the same.
      tie: as in `Forms`.
    """
    if view.may_have_gradient:
        # The region that follows has constants alone: here JAX differentiates by all inputs.
        return _multiply_again(product, view, x, others)
    constants, treedef = jax.tree.flatten((view, tuple(others)))
    like = jax.typeof(x)

    def forward(constants: Sequence[Any], x: jax.Array) -> jax.Array:
        view, others = jax.tree.unflatten(treedef, constants)
        return product(_values(view, x, tie), x, *others)

    def transposed(constants: Sequence[Any], ct: jax.Array) -> jax.Array:
        view, others = jax.tree.unflatten(treedef, constants)
        values = _values(view, ct, tie)
        return jax.linear_transpose(lambda x: product(values, x, *others), like)(ct)[0]

    return apply_linear(Linear(forward, transposed, (key, treedef, like, tie)), constants, x)


def _multiply_again(
    product: Callable[..., jax.Array], view: QuantizedView, x: jax.Array, others: Sequence[Any]
) -> jax.Array:
    """Return the product, which the backward pass computes again from the codes."""

    @jax.checkpoint
    def again(view: QuantizedView, x: jax.Array) -> jax.Array:
        return product(view.dequantize(), x, *others)

    return again(view, x)


def _values(view: QuantizedView, after: jax.Array, tie: str | None) -> jax.Array:
    """Return the values of a view, which are not computed before the array `after` is."""
    # What waits for an array that varies over a mesh varies too, before the steps expect it to.
    misfit = bool(view.pending) and not jaxprs.vary_alike(view.codes, after)
    if tie is None or not after.size or misfit:
        return view.dequantize()
    if tie == "barrier" or is_on_mesh(after):
        weight, _ = lax.optimization_barrier((view.weight, after))
        return dataclasses.replace(view, weight=weight).dequantize()
    return view.dequantize(_zero_from(after))


def wait_for(weight: QuantizedWeight, after: jax.Array) -> QuantizedWeight:
    """Return a weight that is not dequantized before the array `after` is computed."""
    fields = dict(weight.fields)
    if is_on_mesh(after):
        fields, _ = lax.optimization_barrier((fields, after))
    elif after.size:
        codes = weight.format.codes
        fields[codes] += _zero_from(after).astype(fields[codes].dtype)
    return dataclasses.replace(weight, fields=fields)


def _zero_from(x: jax.Array) -> jax.Array:
    """Return 0, computed from an entry of `x`, in a way that XLA does not see through.

    On a CPU XLA drops optimization barriers early, and would dequantize every layer at once. Under
    `vmap` it is one zero for all examples: with one for each, each would have its own codes.
    """

    @jax.custom_batching.custom_vmap
    def zero(x: jax.Array) -> jax.Array:
        first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
        first = first.real if jnp.iscomplexobj(first) else first
        bits = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
        return lax.clamp(bits.dtype.type(0), bits, bits.dtype.type(0))

    @zero.def_vmap
    def _(size: int, is_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        return _zero_from(x), False

    return zero(lax.stop_gradient(x))
