"""Merge-aware adapters: the program runs on the requantized sum, and trains as if on the sum.

Wherever a weight W with quantized codes is used, the values are Q(W + scale·A·B), Q being what
`merge(requantize=...)` does. The gradient goes straight through Q (https://arxiv.org/abs/1308.3432,
section 4): A, B and the magnitude get that of x·(W + scale·A·B), and x that of x·Q(...).
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.algebra import dense, requantized
from lora_jax.core.quantized.coding import Coding
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.sharding.meshes import on_mesh_of, reshard_like
from lora_jax.core.weights import TrainedLeaf
from lora_jax.engine import named_axes
from lora_jax.engine.frozen import frozen
from lora_jax.engine.lazy_weight import STATIC, Axis, LazyWeight, is_lazy
from lora_jax.engine.quantized.view import QuantizedView

#: What moves numbers and changes none: requantizing the moved sum moves the requantized sum.
_MOVES = (
    *("transpose", "squeeze", "reshape", "broadcast_in_dim", "slice", "dynamic_slice", "gather"),
    *("split", "unstack", "concatenate", "stack", "select_n", "rev", "copy", "copy_p", "name"),
    *("sharding_constraint", "stop_gradient", "device_put", "convert_element_type"),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedWeight:
    """A quantized weight and the factors that are merged into its codes, with named axes."""

    w: QuantizedWeight
    a: jax.Array
    b: jax.Array  # the scale included
    gain: Any  # DoRA's, or None
    axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    a_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    b_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    gain_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    coding: Coding = dataclasses.field(metadata=STATIC)

    @classmethod
    def of(cls, lazy: LazyWeight) -> "MergedWeight":
        """Return the weight of a view whose equations are all done on its codes."""
        w, served = lazy.w.weight, lazy.served
        assert served is not None  # or it is not merged
        coding = dataclasses.replace(Coding.of(w, served.kind), dtype=w.dtype)
        gain = None if lazy.gain is None else frozen(lazy.gain)
        axes = (lazy.axes, lazy.a_axes, lazy.b_axes, lazy.gain_axes)
        return cls(w, frozen(lazy.a), frozen(lazy.b), gain, *axes, coding)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.w.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.w.dtype

    def dequantize(self, zero: jax.Array | None = None) -> jax.Array:
        """Return the values that the requantized sum stands for; `zero` as in `dequantize_array`.

        The sum is computed in float32. Where the factors change nothing, the values are W's.
        """
        w = dataclasses.replace(self.w, dtype=jnp.dtype(jnp.float32)).dequantize(zero)
        a, b = (on_mesh_of(x.astype(jnp.float32), w) for x in (self.a, self.b))
        if zero is not None:
            a = a + zero.astype(a.dtype)
        update, names = named_axes.contract(
            a, self.a_axes, b, self.b_axes, self.axes, precision=lax.Precision.HIGHEST
        )
        sizes: dict[Hashable, int] = dict(zip(self.axes, w.shape, strict=True))
        update = named_axes.arrange(update, names, self.axes, sizes)
        total, off = w + reshard_like(update, w), self._changes_nothing()
        if self.gain is not None:
            gain = self._beside_ones(on_mesh_of(self.gain, w), self.gain_axes)
            total, off = total * gain, off & (self.gain == 1).all()
        values = self.coding.encode(total).dequantize()
        own = Coding.of(self.w) == self.coding
        return jnp.where(off, w.astype(self.dtype), values) if own else values

    def _changes_nothing(self) -> jax.Array:
        """Return whether A or B is zero, per index of the batch axes."""
        batch = [axis for axis in self.axes if axis in self.a_axes and axis in self.b_axes]

        def moves(x: jax.Array, axes: Sequence[Axis]) -> jax.Array:
            others = [i for i, axis in enumerate(axes) if axis not in batch]
            left = [axis for axis in axes if axis in batch]
            return self._beside_ones((x != 0).any(others), left)

        return ~(moves(self.a, self.a_axes) & moves(self.b, self.b_axes))

    def _beside_ones(self, x: jax.Array, axes: Sequence[Axis]) -> jax.Array:
        """Return `x` with its axes in the weight's order, and axes of size one for the others."""
        present = [axis for axis in self.axes if axis in axes]
        x = named_axes.arrange(x, axes, present, {})
        return jnp.expand_dims(x, [i for i, axis in enumerate(self.axes) if axis not in present])


@jax.custom_jvp
def _zero_valued(x: jax.Array) -> jax.Array:
    """Return zeros, whose derivative is that of `x`."""
    zeros = jnp.zeros_like(x)
    return jnp.where(jnp.isnan(x), zeros, zeros)  # inside a `shard_map` they vary as `x` does


@_zero_valued.defjvp
def _zero_valued_jvp(primals: Any, tangents: Any) -> Any:
    return _zero_valued(primals[0]), tangents[0]


def straight_through(values: jax.Array, like: jax.Array) -> jax.Array:
    """Return `values` to the bit, plus the derivative of `like`.

    >>> import jax
    >>> jax.grad(lambda x: straight_through(jax.lax.stop_gradient(jnp.round(x)), 3 * x))(1.4)
    Array(3., dtype=float32, weak_type=True)
    """
    return values + reshard_like(_zero_valued(like), values)


class CannotMergeError(Exception):
    """Something was done to a weight's values that is not done to its codes: see `if_merged`."""


def served_view(lazy: LazyWeight) -> QuantizedView:
    """Return the view with the factors merged into its codes, through which no gradient flows.

    Raises:
      CannotMergeError: the codes are not those of the view.
    """
    if not _can_merge(lazy):
        raise CannotMergeError
    return dataclasses.replace(lazy.w, weight=MergedWeight.of(lazy))


def trained_leaf(node: TrainedLeaf, coding: Coding) -> jax.Array:
    """Return a fully trained leaf, requantized, with the gradient of what it is in floats."""
    node = TrainedLeaf(jax.tree.map(frozen, node.w), node.value, frozen(node.scale))
    still = dataclasses.replace(node, value=frozen(node.value))
    return straight_through(requantized(still, coding).dequantize(), dense(node))


def if_merged(
    rule: Callable[[Any, Any, Sequence[Any]], Any], ctx: Any, eqn: Any, values: Sequence[Any]
) -> Any:
    """Return a rule's outputs, or NotImplemented where a weight could not be merged after it.

    That is where the codes cannot follow: an equation on numbers, or one that cuts off blocks whose
    scales share a number. The weight is then requantized before the equation.
    """
    served = {x.served for x in values if is_lazy(x) and x.w is not None}
    if served <= {None}:
        return rule(ctx, eqn, values)
    if eqn.primitive.name == "gather" and _picks_in_blocks(eqn, values[0]):
        return NotImplemented
    try:
        outs = rule(ctx, eqn, values)
    except CannotMergeError:
        return NotImplemented
    made = [] if outs is NotImplemented else [x for x in outs if is_lazy(x) and x.w is not None]
    if made and (len(served) > 1 or eqn.primitive.name not in _MOVES):
        return NotImplemented
    return outs if all(map(_can_merge, made)) else NotImplemented


def _can_merge(lazy: LazyWeight) -> bool:
    """Return whether the view is that of its codes, but for casts, and they are whole."""
    view, served = lazy.w, lazy.served
    if not isinstance(view, QuantizedView) or served is None:
        return False
    if any(step.key != ("convert_element_type",) for step in view.pending):
        return False
    weight = view.weight
    if weight.shape[weight.axis] == served.size:
        return True
    alone = all(field.per_weight != 0 for field in weight.format.fields.values())
    return alone and served.kind is None and weight.block == served.block


def _picks_in_blocks(eqn: Any, lazy: Any) -> bool:
    """Return whether a gather picks numbers along the blocked axis, some perhaps twice."""
    if not is_lazy(lazy) or not isinstance(lazy.w, QuantizedView):
        return False
    at = lazy.w.weight.axis % lazy.w.weight.ndim
    return eqn.params["slice_sizes"][at] != lazy.shape[at]
