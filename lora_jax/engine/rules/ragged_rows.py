"""Ragged products in a batch whose rows use different adapters."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine import named_axes
from lora_jax.engine.arithmetic import add, cast_for_branch, multiply_along
from lora_jax.engine.context import Context
from lora_jax.engine.contraction import Equation
from lora_jax.engine.lazy_weight import RANK, SLOT, Axis, LazyWeight
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rows.groups import Tiles
from lora_jax.engine.rows.mapped import bind_mapped, group_of_entries
from lora_jax.engine.rows.slots import NoPlaceForRows


@dataclasses.dataclass(frozen=True)
class MappedEquation(Equation):
    """A ragged product in one of many rows, each of which is computed alone."""

    def on(self, w: Any, x: jax.Array, tie: str | None) -> jax.Array:
        """Return the output for this weight and this activation."""
        if not isinstance(w, QuantizedView):
            return self._bind(w, x, *self.others)
        # The backward pass dequantizes again.
        again = jax.checkpoint(lambda w, x, *others: self._bind(w.dequantize(), x, *others))
        return again(w, x, *self.others)

    def _bind(self, w: jax.Array, x: jax.Array, *others: Any) -> jax.Array:
        return bind_mapped(self.eqn, (x, w, *others))[0]


def first_factor(lazy: LazyWeight, fixed: Sequence[Axis], summed: Collection[Axis]) -> str | None:
    """Return the factor that has all of the summed axes, if the other one has none.

    `fixed` are the axes of the weight that both may have: those of groups and of batches.
    """
    own = {RANK, SLOT, *fixed}
    a, b = set(lazy.a_axes) - own, set(lazy.b_axes) - own
    if a & b or not a | b <= set(lazy.axes):
        return None
    if b.isdisjoint(summed):
        return "a"
    return "b" if a.isdisjoint(summed) else None


def multiply_rows(
    ctx: Context, eqn: Any, x: jax.Array, lazy: LazyWeight, sizes: jax.Array
) -> jax.Array:
    """Return x·W[g] + (x·A[s, g])·(scale·B[s, g]), g the group and s the slot of each entry of x.

    The entries are those of all rows. Where they outnumber the factors, no factor is copied for
    each of them.

    Raises:
      NoPlaceForRows: which row an entry is of is not known, or each row drops other inputs.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, _) = numbers.dot_dimension_numbers
    (ragged,), (grouped,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    group, summed = lazy.axes[grouped], [lazy.axes[i] for i in w_summed]
    first = first_factor(lazy, [group], summed)
    whole = {ragged, *x_summed} == {*range(x.ndim)} and not x_batch
    if not whole or first is None or lazy.key is not None or lazy.served is not None:
        raise NoPlaceForRows
    assert lazy.row is not None
    slots = lazy.row.slot[ctx.rows_of_entries(eqn, 0, lazy.row.slot.size)]
    own = _OwnAdapters.of(lazy, group, group_of_entries(sizes, len(slots)), slots)
    free = [axis for axis in lazy.axes if axis not in (group, *summed)]
    x_axes = [summed[x_summed.index(i)] if i != ragged else _ENTRIES for i in range(x.ndim)]
    if not own.gain_comes_last(free):
        x = own.apply_gain(x, x_axes)
    y = Equation(eqn, False, summed, [group], (sizes,)).on(lazy.w, x, ctx.forms.tie)
    entries = jnp.moveaxis(x, (ragged, *x_summed), range(x.ndim)).reshape(len(slots), -1)
    update = own.update(entries, first, summed, free, eqn.params["precision"])
    total = add(y, update.reshape(y.shape), eqn.outvars[0].aval.dtype)
    return own.apply_gain(total, [_ENTRIES, *free]) if own.gain_comes_last(free) else total


_ENTRIES = Axis((), -4_000_000)


@dataclasses.dataclass(frozen=True)
class _OwnAdapters:
    """The adapters of all slots and groups, of which each entry uses one or none."""

    lazy: LazyWeight
    group: Axis
    number: jax.Array  # [entries]: group · slots + slot, or their number for none
    tiles: Tiles

    @classmethod
    def of(
        cls, lazy: LazyWeight, group: Axis, groups: jax.Array, slots: jax.Array
    ) -> "_OwnAdapters":
        count = lazy.a.shape[lazy.a_axes.index(SLOT)]
        every = lazy.sizes[group] * count
        number = jnp.where(slots < 0, every, jnp.minimum(groups * count + slots, every))
        return cls(lazy, group, number, Tiles.of(number, every))

    def update(
        self, x: jax.Array, first: str, summed: Sequence[Axis], free: Sequence[Axis], precision: Any
    ) -> jax.Array:
        """Return the branch on `[entries, in]`, `[entries, out]`; zeros where there is none."""
        second = "b" if first == "a" else "a"
        h, f, dtype = cast_for_branch(x, self._each(first, [*summed, RANK]), self.lazy)
        f = f.reshape(len(f), -1, f.shape[-1])
        h = self.tiles.multiply(self.tiles.split(h), f, precision, dtype)
        if self.lazy.scale is not None:
            h = h * self._each("scale", [])[self.tiles.groups].astype(h.dtype)[:, None, None]
        h, f, dtype = cast_for_branch(h, self._each(second, [RANK, *free]), self.lazy)
        y = self.tiles.multiply(h, f.reshape(*f.shape[:2], -1), precision, dtype)
        return self.tiles.join(y)

    def gain_comes_last(self, free: Sequence[Axis]) -> bool:
        """Return whether the gain is one of outputs, not of inputs."""
        return {*self.lazy.gain_axes} <= {SLOT, self.group, *free}

    def apply_gain(self, x: jax.Array, axes: Sequence[Axis]) -> jax.Array:
        """Multiply `x`, its axes named, by the gain of each entry's own adapter, if it has one."""
        if self.lazy.gain is None:
            return x
        present = [axis for axis in axes if axis in self.lazy.gain_axes]
        own = self._each("gain", present).at[self.number].get(mode="fill", fill_value=1)
        return multiply_along(x, axes, own, (_ENTRIES, *present))

    def _each(self, member: str, axes: Sequence[Axis]) -> jax.Array:
        """Return a member as `[groups · slots, *axes]`."""
        array, own = getattr(self.lazy, member), self.lazy.axes_of(member)
        count = self.lazy.a.shape[self.lazy.a_axes.index(SLOT)]
        sizes = {**self.lazy.sizes, SLOT: count}
        array = named_axes.arrange(array, own, [self.group, SLOT, *axes], sizes)
        return array.reshape(-1, *array.shape[2:])
