"""The rule for `ragged_dot`: rows in groups, each with a weight of its own, as experts have."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import jaxprs, named_axes
from lora_jax.engine.arithmetic import add, branch_dtypes, drop
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import RANK, Axis, LazyWeight, is_lazy
from lora_jax.engine.probes import observe
from lora_jax.engine.rules.registry import Rule, rule

RULES: dict[str, Rule] = {}


@rule(RULES, "ragged_dot_general")
def _ragged_dot(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """x·W[g] + (x·A[g])·(scale·B[g]) for the rows of each group g, by two ragged products."""
    x, lazy, group_sizes = args
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    ragged, grouped = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if not is_lazy(lazy) or is_lazy(group_sizes) or eqn.params["group_offset"] is not None:
        return NotImplemented
    if len(grouped) != 1 or {*ragged} & {*x_summed, *x_batch}:
        return NotImplemented  # groups of what is summed, or of the batch: W has no axis of them
    if is_lazy(x):
        x = ctx.densify(x, eqn, " (both sides are adapted)")
    x_axes: list[Axis] = [Axis((), -2 - i) for i in range(x.ndim)]
    for x_dim, w_dim in zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True):
        x_axes[x_dim] = lazy.axes[w_dim]
    group, rows = lazy.axes[grouped[0]], x_axes[ragged[0]]
    batch, summed = [lazy.axes[i] for i in w_batch], [lazy.axes[i] for i in w_summed]
    ctx.record(lazy, eqn, summed=summed, batch=[group, *batch])
    if lazy.a is None:
        return jaxprs.bind(eqn, (x, lazy.w, group_sizes))
    if lazy.gain is not None:
        return NotImplemented  # a row's gain is that of its group
    product = _Product(eqn, group_sizes, rows, group, tuple(batch), lazy)
    order = product.order(summed)
    if order is None:
        return NotImplemented
    if lazy.probe:
        (y,) = jaxprs.bind(eqn, (x, lazy.w, group_sizes))
        first = lambda x, a: product.with_a(a)(x, x_axes, "a", summed)[0]
        return [observe(y, x, lazy, first) if order[0] == "a" else y]
    if order[0] == "a":
        x = drop(x, lazy, ctx.next_site())
    h, h_axes = product(x, x_axes, order[0], summed)
    update, axes = product(h, h_axes, order[1], [RANK])
    free = [axis for axis in lazy.axes if axis not in (group, *batch, *summed)]
    out = [*batch, *(axis for axis in x_axes if axis not in (*batch, *summed)), *free]
    y = None if lazy.w is None else jaxprs.bind(eqn, (x, lazy.w, group_sizes))[0]
    return [add(y, named_axes.arrange(update, axes, out, lazy.sizes), eqn.outvars[0].aval.dtype)]


@dataclasses.dataclass(frozen=True)
class _Product:
    """Ragged products with the factors of a weight, in the groups of the weight's own product."""

    eqn: Any
    group_sizes: jax.Array
    rows: Axis  # the activation's axis that falls into groups
    group: Axis  # the weight's axis of groups
    batch: tuple[Axis, ...]
    lazy: LazyWeight

    def with_a(self, a: jax.Array) -> "_Product":
        """The same with other values of A."""
        return dataclasses.replace(self, lazy=dataclasses.replace(self.lazy, a=a))

    def order(self, summed: Sequence[Axis]) -> tuple[str, str] | None:
        """Which factor meets the activation first; None where two products are not enough."""
        own = {RANK, self.group, *self.batch}
        a, b = set(self.lazy.a_axes) - own, set(self.lazy.b_axes) - own
        if a & b or not a | b <= set(self.lazy.axes):
            return None
        if a.isdisjoint(summed) or b.isdisjoint(summed):
            return ("a", "b") if b.isdisjoint(summed) else ("b", "a")
        return None

    def __call__(
        self, x: jax.Array, x_axes: Sequence[Axis], factor: str, summed: Sequence[Axis]
    ) -> tuple[jax.Array, list[Axis]]:
        """`x` contracted over `summed` with a factor, and the axes of the result."""
        compute, accumulate = branch_dtypes(x.dtype, self.lazy)
        f, f_axes = getattr(self.lazy, factor), self.lazy.axes_of(factor)
        fixed = [self.group, *self.batch, *summed]
        free = [axis for axis in f_axes if axis not in fixed]
        f = named_axes.arrange(f, f_axes, [*fixed, *free], self.lazy.sizes)

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
        y = lax.ragged_dot_general(
            x.astype(compute),
            f.astype(compute),
            self.group_sizes,
            numbers,
            precision=self.eqn.params["precision"],
            preferred_element_type=accumulate,
        )
        kept = [axis for axis in x_axes if axis not in (*self.batch, *summed)]
        return y, [*self.batch, *kept, *free]
