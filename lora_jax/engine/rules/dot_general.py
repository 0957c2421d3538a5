"""The rule for `dot_general`, whichever way round the weight is and whichever axes are summed."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.engine import jaxprs, products
from lora_jax.engine.arithmetic import side_that_takes_gain
from lora_jax.engine.context import Context
from lora_jax.engine.contraction import DotBranch, Equation, contract_weight
from lora_jax.engine.lazy_weight import Axis, LazyWeight, is_lazy
from lora_jax.engine.products import Product, add_update, is_shareable
from lora_jax.engine.rules.indexing import densify_rows
from lora_jax.engine.rules.registry import PrimitiveRule, rule
from lora_jax.engine.rules.rows_apart import RowsApart

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "dot_general")
def _dot_general(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    args = densify_rows(eqn, args)
    if not any(map(is_lazy, args)):
        return jaxprs.bind(eqn, args)
    weight_is_left = _weight_is_left(*args)
    lazy, x = args if weight_is_left else args[::-1]
    if is_lazy(x):
        contracted, batched = (dims[weight_is_left] for dims in _dimensions(eqn))
        x = _as_activation(ctx, eqn, x, contracted, batched)
    rows = RowsApart.of(ctx, eqn, lazy, x, weight_is_left)
    x = rows.split(x)
    equation, branch = _parts(eqn, lazy, x, weight_is_left, rows)
    outs = contract_weight(ctx, equation, branch, x)
    return [y.reshape(eqn.outvars[0].aval.shape) for y in outs] if rows.divides else outs


def share(ctx: Context, inputs: Sequence[tuple[Any, Sequence[Any]]]) -> None:
    """Compute x·A of several equations that meet the same activation, where that can be shared."""
    found: dict[Any, list[tuple[Any, Product]]] = defaultdict(list)
    for eqn, args in inputs:
        if sum(map(is_lazy, args)) == 1:
            lazy, x = sorted(args, key=is_lazy, reverse=True)
            if lazy.a is not None and lazy.w is not None and not lazy.origin.looked_up:
                if lazy.served:
                    continue  # its x·A gives x no gradient
                rows = RowsApart.of(ctx, eqn, lazy, x, is_lazy(args[0]))
                x = rows.split(x)
                _, branch = _parts(eqn, lazy, x, is_lazy(args[0]), rows)
                after = side_that_takes_gain(lazy, branch.x_axes, branch.out_axes) == "out"
                product = branch.product(x)
                if after and is_shareable(product):
                    found[product.compute].append((eqn, product))
    for group in found.values():
        if len(group) > 1:
            hiddens = products.share([product for _, product in group], ctx.forms)
            ctx.hidden.update({id(eqn): h for (eqn, _), h in zip(group, hiddens, strict=True)})


@dataclasses.dataclass(frozen=True)
class _EquationBranch(DotBranch):
    """The branch of a `dot_general`: its x·A may be shared, its sum may be marked."""

    eqn: Any = None
    has_batch: bool = False

    def add_to(self, y: Any, x: jax.Array, ctx: Context) -> jax.Array:
        half = ctx.hidden.pop(id(self.eqn), None) or self.product(x)
        total = add_update(y, half, self.dtype, ctx.forms)
        return total if self.lazy.served else self.mark(total, ctx)

    def mark(self, total: jax.Array, ctx: Context) -> jax.Array:
        """Return the sum, marked unless there are batch axes, which policies tell apart."""
        return total if self.has_batch else ctx.mark_sum(total)


def _parts(
    eqn: Any, lazy: LazyWeight, x: jax.Array, weight_is_left: bool, rows: RowsApart
) -> tuple[Equation, _EquationBranch]:
    """Return what a `dot_general` does with its axes, and its branch."""
    contracted, batched = (dims[::-1] if weight_is_left else dims for dims in _dimensions(eqn))
    # x_axes: fresh names, and the weight's where the two meet
    x_axes: list[Axis] = [Axis((), -2 - i) for i in range(x.ndim)]
    for x_dims, w_dims in (contracted, batched):
        for x_dim, w_dim in zip(x_dims, w_dims, strict=True):
            x_axes[rows.number(x_dim)] = lazy.axes[w_dim]
    x_axes = rows.named(x_axes)
    batch = [lazy.axes[i] for i in batched[1]]
    summed = [lazy.axes[i] for i in contracted[1]]
    # out: [*batch, *free axes of the left operand, *free axes of the right one]
    x_free = [axis for axis in x_axes if axis not in summed and axis not in batch]
    w_free = [axis for axis in lazy.axes if axis not in summed and axis not in batch]
    out = [*batch, *w_free, *x_free] if weight_is_left else [*batch, *x_free, *w_free]
    branch = _EquationBranch(
        lazy,
        x_axes,
        out,
        dtype=eqn.outvars[0].aval.dtype,
        precision=eqn.params["precision"],
        eqn=eqn,
        has_batch=bool(batch),
    )
    sizes = lazy.sizes | dict(zip(x_axes, x.shape, strict=True))
    shape = tuple(sizes[axis] for axis in out) if rows.divides else None
    return Equation(eqn, weight_is_left, summed, batch, shape=shape), branch


def _weight_is_left(left: Any, right: Any) -> bool:
    """Return whether the left operand is the weight.

    If both are lazy, it is the right one, unless that is rows that were looked up.
    """
    if is_lazy(left) and is_lazy(right):
        return bool(right.origin.indexed) and not left.origin.indexed
    return is_lazy(left)


def _as_activation(
    ctx: Context, eqn: Any, lazy: LazyWeight, summed: Sequence[int], batch: Sequence[int]
) -> jax.Array:
    """Materialize a weight that meets another weight."""
    if not ctx.infers:
        return ctx.densify(lazy, eqn, " (both sides are adapted)")
    axes = lazy.axes
    ctx.record(lazy, eqn, [axes[i] for i in summed], [axes[i] for i in batch], is_operand=True)
    return lazy.w


def _dimensions(eqn: Any) -> Any:
    """Return ((left, right) contracted, (left, right) batched)."""
    return eqn.params["dimension_numbers"]
