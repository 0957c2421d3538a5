"""An activation whose axis of rows is apart from the axes that it was merged with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import ROW, Axis, LazyWeight
from lora_jax.engine.rows.slots import NoPlaceForRows


@dataclasses.dataclass(frozen=True)
class RowsApart:
    """How one axis of an activation, `[outer * rows * inner]`, becomes axes of which one is rows.

    Outer and inner axes of size one are left out. A `sizes` of None stands for an activation whose
    rows do not matter, because the weight has one adapter.
    """

    axis: int = 0
    sizes: tuple[int, ...] | None = None  # of the axes that it becomes
    at: int = 0  # which of them is rows

    @classmethod
    def of(
        cls, ctx: Context, eqn: Any, lazy: LazyWeight, x: jax.Array, weight_is_left: bool
    ) -> "RowsApart":
        """Return how the activation of an equation is split, for the adapters that `lazy` has.

        Raises:
          NoPlaceForRows: every row has its own adapter, and the activation has no axis of rows.
        """
        if not lazy.differs_by_row:
            return cls()
        axis, inner, _ = ctx.place_of_rows(eqn, int(weight_is_left))
        rows = lazy.b.shape[lazy.b_axes.index(ROW)]
        outer, left = divmod(x.shape[axis], rows * inner)
        if left or not outer:
            raise NoPlaceForRows
        sizes = (outer, rows, inner)
        kept = [i for i, n in enumerate(sizes) if n != 1 or i == 1]
        return cls(axis, tuple(sizes[i] for i in kept), kept.index(1))

    @property
    def divides(self) -> bool:
        """Whether one axis becomes several."""
        return self.sizes is not None and len(self.sizes) > 1

    def split(self, x: jax.Array) -> jax.Array:
        """Return the activation with its rows apart."""
        if self.sizes is None or not self.divides:
            return x
        return x.reshape(*x.shape[: self.axis], *self.sizes, *x.shape[self.axis + 1 :])

    def number(self, axis: int) -> int:
        """Return the number that an axis has after the split; of the axis of rows, the first."""
        return axis + (len(self.sizes) - 1 if self.sizes and axis > self.axis else 0)

    def named(self, axes: Sequence[Axis]) -> list[Axis]:
        """Return the names of the axes after the split, with that of the rows among them."""
        if self.sizes is None:
            return list(axes)
        at = self.axis + self.at
        if axes[at].uid >= 0:  # it is the weight's too
            raise NoPlaceForRows
        return [ROW if i == at else axis for i, axis in enumerate(axes)]
