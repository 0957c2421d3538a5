"""Rules for contractions: x·W + (x·A)·(scale·B), for every orientation of W."""

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import _jaxpr
from lora_jax.context import Context
from lora_jax.gathers import rows_as_activation
from lora_jax.lazy import Axis, LazyWeight, add, branch, drop, is_lazy
from lora_jax.rules import Rule, rule

RULES: dict[str, Rule] = {}


@rule(RULES, "dot_general")
def _dot_general(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """x·W + (x·A)·(scale·B), for every orientation of W and every choice of its axes."""
    args = rows_as_activation(eqn, args)
    if not any(map(is_lazy, args)):
        return _jaxpr.bind(eqn, args)
    weight_is_left = _weight_is_left(*args)
    lazy, x = args if weight_is_left else args[::-1]
    contracted, batched = eqn.params["dimension_numbers"]
    if not weight_is_left:
        contracted, batched = contracted[::-1], batched[::-1]
    if is_lazy(x):
        x = _as_activation(ctx, eqn, x, contracted[1], batched[1])
    x_axes: list[Axis] = [Axis((), -2 - i) for i in range(x.ndim)]
    for w_dim, x_dim in (*zip(*contracted, strict=True), *zip(*batched, strict=True)):
        x_axes[x_dim] = lazy.axes[w_dim]
    batch = [lazy.axes[i] for i in batched[0]]
    summed = [lazy.axes[i] for i in contracted[0]]
    x_free = [axis for axis in x_axes if axis not in summed and axis not in batch]
    w_free = [axis for axis in lazy.axes if axis not in summed and axis not in batch]
    out = [*batch, *w_free, *x_free] if weight_is_left else [*batch, *x_free, *w_free]

    ctx.record(lazy, eqn, summed=summed, batch=batch)
    operands = (lazy.w, x) if weight_is_left else (x, lazy.w)
    y = None if lazy.w is None else _jaxpr.bind(eqn, operands)[0]
    if lazy.a is None:
        return [y]
    if set(summed) <= set(lazy.a_axes):
        x = drop(x, lazy, ctx.next_site())
    update = branch(lazy, x, x_axes, out, eqn.params["precision"])
    return [add(y, update, eqn.outvars[0].aval.dtype)]


def _weight_is_left(left: Any, right: Any) -> bool:
    """Of two lazy operands the right one is the weight, unless it is rows that were looked up."""
    if is_lazy(left) and is_lazy(right):
        return bool(right.indexed) and not left.indexed
    return is_lazy(left)


def _as_activation(
    ctx: Context, eqn: Any, lazy: LazyWeight, summed: Sequence[int], batch: Sequence[int]
) -> jax.Array:
    """The dense form of a weight that meets another weight."""
    if not ctx.infers:
        return ctx.make_dense(lazy, eqn, " (both sides are adapted)")
    axes = lazy.axes
    ctx.record(lazy, eqn, [axes[i] for i in summed], [axes[i] for i in batch], is_operand=True)
    return lazy.w
