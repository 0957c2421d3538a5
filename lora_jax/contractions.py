"""Rules for contractions: x·W + (x·A)·(scale·B), for every orientation of W."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax import _contract, _jaxpr
from lora_jax.context import Context
from lora_jax.gathers import rows_as_activation
from lora_jax.lazy import RANK, Axis, LazyWeight, add, branch, branch_dtypes, drop, is_lazy
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


@rule(RULES, "conv_general_dilated")
def _conv(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """A convolution with A to `rank` channels, then B as a 1×1 convolution (or B first, then A)."""
    x, lazy = args
    params = eqn.params
    if not is_lazy(lazy):
        return NotImplemented
    if is_lazy(x):
        x = ctx.make_dense(x, eqn, " (both sides are adapted)")
    out_feature, in_feature, *window = (lazy.axes[i] for i in params["dimension_numbers"].rhs_spec)
    ctx.record(lazy, eqn, summed=[in_feature, *window], batch=[])
    if lazy.a is None:
        return _jaxpr.bind(eqn, (x, lazy.w))
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return NotImplemented
    a_axes, b_axes = set(lazy.a_axes) - {RANK}, set(lazy.b_axes) - {RANK}
    if a_axes == {in_feature, *window} and b_axes == {out_feature}:
        x = drop(x, lazy, ctx.next_site())
        update = _conv_then_mix(eqn, lazy, x, out_feature)
    elif a_axes == {out_feature, *window} and b_axes == {in_feature}:
        update = _mix_then_conv(eqn, lazy, x, in_feature)
    else:
        return NotImplemented
    y = None if lazy.w is None else _jaxpr.bind(eqn, (x, lazy.w))[0]
    return [add(y, update, eqn.outvars[0].aval.dtype)]


def _conv_then_mix(eqn: Any, lazy: LazyWeight, x: jax.Array, out_feature: Axis) -> jax.Array:
    """y = B·(A ∗ x): A takes the place of the kernel, with `rank` output features."""
    h = _conv_with_a(eqn, lazy, x, out_feature)
    return _mix(eqn, lazy, h, eqn.params["dimension_numbers"].out_spec[1], RANK, out_feature)


def _mix_then_conv(eqn: Any, lazy: LazyWeight, x: jax.Array, in_feature: Axis) -> jax.Array:
    """y = A ∗ (B·x), as a backward pass has it: the kernel's in features are the layout's out."""
    h = _mix(eqn, lazy, x, eqn.params["dimension_numbers"].lhs_spec[1], in_feature, RANK)
    return _conv_with_a(eqn, lazy, h, in_feature)


def _conv_with_a(eqn: Any, lazy: LazyWeight, x: jax.Array, replaced: Axis) -> jax.Array:
    compute, accumulate = branch_dtypes(x, lazy)
    wanted = [RANK if axis == replaced else axis for axis in lazy.axes]
    kernel = _contract.arrange(lazy.a, lazy.a_axes, wanted, {})
    params = {
        k: v for k, v in eqn.params.items() if k not in ("preferred_element_type", "out_sharding")
    }
    return lax.conv_general_dilated(
        x.astype(compute), kernel.astype(compute), **params, preferred_element_type=accumulate
    )


def _mix(eqn: Any, lazy: LazyWeight, x: jax.Array, at: int, summed: Axis, made: Axis) -> jax.Array:
    """Contract axis `at` of an activation, which is `summed`, with B; `made` takes its place."""
    compute, accumulate = branch_dtypes(x, lazy)
    names = [summed if i == at else Axis((), -2 - i) for i in range(x.ndim)]
    wanted = [made if name == summed else name for name in names]
    y, y_names = _contract.contract(
        x.astype(compute),
        names,
        lazy.b.astype(compute),
        lazy.b_axes,
        wanted,
        precision=eqn.params["precision"],
        preferred_element_type=accumulate,
    )
    return _contract.arrange(y, y_names, wanted, {})
