"""The rule for `ragged_dot`: groups of rows, each with its own weight (experts)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import named_axes
from lora_jax.engine.arithmetic import add, cast_for_branch
from lora_jax.engine.context import Context
from lora_jax.engine.contraction import Branch, Equation, contract_weight
from lora_jax.engine.lazy_weight import RANK, Axis, is_lazy
from lora_jax.engine.probes import observe
from lora_jax.engine.rows.mapped import mapped_ragged_dot
from lora_jax.engine.rules.ragged_rows import MappedEquation, first_factor, multiply_rows
from lora_jax.engine.rules.registry import PrimitiveRule, rule

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "ragged_dot_general")
def _ragged_dot(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Compute x·W[g] + (x·A[g])·(scale·B[g]) for the rows of each group g."""
    x, lazy, group_sizes = args
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    ragged, grouped = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if not is_lazy(lazy) or is_lazy(group_sizes) or eqn.params["group_offset"] is not None:
        return NotImplemented
    if len(grouped) != 1 or {*ragged} & {*x_summed, *x_batch}:
        return NotImplemented  # groups along a summed or batch axis: W has no axis of groups
    if is_lazy(x):
        x = ctx.densify(x, eqn, " (both sides are adapted)")
    if lazy.row is not None:  # that of all rows
        return [multiply_rows(ctx, eqn, x, lazy, group_sizes)]
    # x_axes: fresh names, and the weight's where the two meet
    x_axes: list[Axis] = [Axis((), -2 - i) for i in range(x.ndim)]
    for x_dim, w_dim in zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True):
        x_axes[x_dim] = lazy.axes[w_dim]
    batch, summed = [lazy.axes[i] for i in w_batch], [lazy.axes[i] for i in w_summed]
    # out_axes: [*batch, *free axes of x, *free axes of the weight]; its axis of groups is gone,
    # so a gain, which is a group's, has no side and the weight is materialized
    group, rows = lazy.axes[grouped[0]], x_axes[ragged[0]]
    x_free = [axis for axis in x_axes if axis not in (*batch, *summed)]
    w_free = [axis for axis in lazy.axes if axis not in (group, *batch, *summed)]
    out_axes = [*batch, *x_free, *w_free]
    kind = MappedEquation if ctx.maps_rows else Equation
    equation = kind(eqn, False, summed, [group, *batch], (group_sizes,))
    product = mapped_ragged_dot if ctx.maps_rows else lax.ragged_dot_general
    meets = (eqn, group_sizes, rows, group, batch, summed, product)
    branch = RaggedBranch(lazy, x_axes, out_axes, *meets)
    return contract_weight(ctx, equation, branch, x)


@dataclasses.dataclass(frozen=True)
class RaggedBranch(Branch):
    """The branch of a ragged product: each factor in the groups of the weight's own product."""

    eqn: Any
    group_sizes: jax.Array
    rows: Axis  # the activation's axis that is divided into groups
    group: Axis  # the weight's axis of groups
    batch: Sequence[Axis]
    summed: Sequence[Axis]
    product: Callable[..., jax.Array]  # `lax.ragged_dot_general`, or as one row of many has it

    def first_factor(self) -> str | None:
        """Return the factor that has all of the summed axes, if the other one has none."""
        return first_factor(self.lazy, [self.group, *self.batch], self.summed)

    def add_to(self, y: Any, x: jax.Array, ctx: Context) -> jax.Array:
        """Return `y` plus two ragged products, over the summed axes and over the rank."""
        first = self.first_factor()
        second = "b" if first == "a" else "a"
        h, axes = self._contract(x, self.x_axes, first, self.summed)
        update, axes = self._contract(h, axes, second, [RANK])
        update = named_axes.arrange(update, axes, self.out_axes, self.lazy.sizes)
        return add(y, update, self.eqn.outvars[0].aval.dtype)

    def tap(self, y: Any, x: jax.Array) -> Any:
        """Return `y`, with `x` tapped in its ragged product with A."""

        def first(x: jax.Array, a: jax.Array) -> jax.Array:
            probe = dataclasses.replace(self, lazy=dataclasses.replace(self.lazy, a=a))
            return probe._contract(x, self.x_axes, "a", self.summed)[0]

        return observe(y, x, self.lazy, first)

    def _contract(
        self, x: jax.Array, x_axes: Sequence[Axis], factor: str | None, summed: Sequence[Axis]
    ) -> tuple[jax.Array, list[Axis]]:
        """Contract `x` over `summed` with a factor; return the result and its axes."""
        f, f_axes = getattr(self.lazy, str(factor)), self.lazy.axes_of(str(factor))
        # f: [group, *batch, *summed, *free]
        fixed = [self.group, *self.batch, *summed]
        free = [axis for axis in f_axes if axis not in fixed]
        f = named_axes.arrange(f, f_axes, [*fixed, *free], self.lazy.sizes)
        x, f, accumulate = cast_for_branch(x, f, self.lazy)

        def at(axes: Sequence[Axis], wanted: Sequence[Axis]) -> list[int]:
            return [list(axes).index(axis) for axis in wanted]

        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(
                (at(x_axes, summed), at(fixed, summed)),
                (at(x_axes, self.batch), at(fixed, self.batch)),
            ),
            lhs_ragged_dimensions=at(x_axes, [self.rows]),
            rhs_group_dimensions=[0],
        )
        # y: [*batch, *axes of x that are kept, *free]
        y = self.product(
            x,
            f,
            self.group_sizes,
            numbers,
            precision=self.eqn.params["precision"],
            preferred_element_type=accumulate,
        )
        kept = [axis for axis in x_axes if axis not in (*self.batch, *summed)]
        return y, [*self.batch, *kept, *free]
