"""The rule for convolutions: the factor with the window convolves, the other one mixes channels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import jaxprs, named_axes
from lora_jax.engine.arithmetic import add, apply_gain, branch_dtypes, drop, side_that_takes_gain
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import RANK, Axis, LazyWeight, is_lazy
from lora_jax.engine.probes import observe
from lora_jax.engine.rules.registry import Rule, rule

RULES: dict[str, Rule] = {}


@rule(RULES, "conv_general_dilated")
def _conv(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """A convolution with A to `rank` channels, then B as a 1×1 convolution (or B first, then A).

    The weight is the kernel, or the image that an activation convolves.
    """
    is_kernel = is_lazy(args[1])
    x, lazy = args if is_kernel else args[::-1]
    if is_lazy(x):
        x = ctx.densify(x, eqn, " (both sides are adapted)")
    roles = _Roles.of(eqn, lazy, is_kernel)
    ctx.record(lazy, eqn, summed=[roles.inner, *roles.window], batch=[])
    if lazy.a is None:
        return jaxprs.bind(eqn, (x, lazy.w) if is_kernel else (lazy.w, x))
    a_axes, b_axes = set(lazy.a_axes) - {RANK}, set(lazy.b_axes) - {RANK}
    x_axes, out_axes = ([Axis((), -2 - i) for i in range(x.ndim)] for _ in range(2))
    x_axes[roles.x_inner], out_axes[roles.out] = roles.inner, roles.outer
    takes_gain = side_that_takes_gain(lazy, x_axes if roles.groups == 1 else (), out_axes)
    if takes_gain is None:
        return NotImplemented
    x = apply_gain(x, x_axes, lazy) if takes_gain == "x" else x
    if b_axes <= {roles.outer} and a_axes <= {roles.inner, *roles.window}:
        if lazy.probe:
            return [_observed(eqn, lazy, x, roles)]
        if not _pays(lazy, roles):
            return NotImplemented
        update = _convolve_then_mix(eqn, lazy, drop(x, lazy, ctx.next_site()), roles)
    elif b_axes <= {roles.inner} and a_axes <= {roles.outer, *roles.window} and roles.groups == 1:
        if lazy.probe:
            return NotImplemented
        update = _mix_then_convolve(eqn, lazy, x, roles)
    else:
        return NotImplemented
    operands = (x, lazy.w) if is_kernel else (lazy.w, x)
    y = None if lazy.w is None else jaxprs.bind(eqn, operands)[0]
    total = add(y, update, eqn.outvars[0].aval.dtype)
    return [apply_gain(total, out_axes, lazy) if takes_gain == "out" else total]


@dataclasses.dataclass(frozen=True)
class _Roles:
    """What the axes of the weight do, and where their counterparts are."""

    is_kernel: bool
    outer: Axis  # the kernel's out features, or the image's batch
    inner: Axis  # what is summed with the other side's
    window: tuple[Axis, ...]
    x_inner: int  # the other side's dimension that `inner` is summed with
    out: int  # the result's dimension that `outer` becomes
    feature_groups: int
    batch_groups: int

    @classmethod
    def of(cls, eqn: Any, lazy: LazyWeight, is_kernel: bool) -> "_Roles":
        numbers = eqn.params["dimension_numbers"]
        mine, other = numbers.rhs_spec, numbers.lhs_spec
        if not is_kernel:
            mine, other = other, mine
        outer, inner, *window = (lazy.axes[i] for i in mine)
        return cls(
            is_kernel,
            outer,
            inner,
            tuple(window),
            other[1],
            numbers.out_spec[1 if is_kernel else 0],
            eqn.params["feature_group_count"],
            eqn.params["batch_group_count"],
        )

    @property
    def groups(self) -> int:
        return self.feature_groups * self.batch_groups


def _pays(lazy: LazyWeight, roles: _Roles) -> bool:
    """Whether A can serve every group, and for fewer operations than the weight itself takes.

    An output position costs groups·rank·window·inner for A and rank·outer for B; a depthwise
    kernel, which has one window an output, is cheaper whole.
    """
    if roles.groups == 1:
        return True
    if not roles.is_kernel:
        return roles.batch_groups == 1
    sizes = lazy.sizes
    summed = math.prod(sizes[axis] for axis in (roles.inner, *roles.window))
    return lazy.rank * (roles.groups * summed + sizes[roles.outer]) < summed * sizes[roles.outer]


def _convolve_then_mix(eqn: Any, lazy: LazyWeight, x: jax.Array, roles: _Roles) -> jax.Array:
    """y = B·(A ∗ x): A takes the place of the weight, with `rank` out features a group."""
    h = _convolve_with_a(eqn, lazy, x, roles, roles.outer)
    if roles.groups == 1 or not roles.is_kernel:
        return _mix(eqn, lazy, h, roles.out, RANK, roles.outer)
    return _mix_in_groups(eqn, lazy, h, roles)


def _observed(eqn: Any, lazy: LazyWeight, x: jax.Array, roles: _Roles) -> jax.Array:
    """The convolution with the base, its windows tapped where the weight is the kernel."""
    if not roles.is_kernel:
        return jaxprs.bind(eqn, (lazy.w, x))[0]
    (y,) = jaxprs.bind(eqn, (x, lazy.w))

    def first(x: jax.Array, a: jax.Array) -> jax.Array:
        return _convolve_with_a(eqn, dataclasses.replace(lazy, a=a), x, roles, roles.outer)

    windows = y.size // y.shape[roles.out] * roles.groups
    return observe(y, x, lazy, first, windows)


def _mix_then_convolve(eqn: Any, lazy: LazyWeight, x: jax.Array, roles: _Roles) -> jax.Array:
    """y = A ∗ (B·x), as a backward pass has it: the kernel's in features are the layout's out."""
    h = _mix(eqn, lazy, x, roles.x_inner, roles.inner, RANK)
    return _convolve_with_a(eqn, lazy, h, roles, roles.inner)


def _convolve_with_a(
    eqn: Any, lazy: LazyWeight, x: jax.Array, roles: _Roles, replaced: Axis
) -> jax.Array:
    """The convolution with A for the weight, RANK in the place of one of the weight's axes."""
    compute, accumulate = branch_dtypes(x.dtype, lazy)
    wanted = [RANK if axis == replaced else axis for axis in lazy.axes]
    a = named_axes.arrange(lazy.a, lazy.a_axes, wanted, lazy.sizes).astype(compute)
    if roles.is_kernel and roles.feature_groups > 1:
        a = jnp.concatenate([a] * roles.feature_groups, wanted.index(RANK))  # A serves every group
    x = x.astype(compute)
    params = {
        k: v for k, v in eqn.params.items() if k not in ("preferred_element_type", "out_sharding")
    } | {"batch_group_count": 1}
    operands = (x, a) if roles.is_kernel else (a, x)
    return lax.conv_general_dilated(*operands, **params, preferred_element_type=accumulate)


def _mix(eqn: Any, lazy: LazyWeight, x: jax.Array, at: int, summed: Axis, made: Axis) -> jax.Array:
    """Contract axis `at` of an activation, which is `summed`, with B; `made` takes its place."""
    names = [summed if i == at else Axis((), -2 - i) for i in range(x.ndim)]
    wanted = [made if name == summed else name for name in names]
    b_axes = [RANK, made if summed == RANK else summed]
    b = named_axes.arrange(lazy.b, lazy.b_axes, b_axes, lazy.sizes)
    return _product(eqn, lazy, (x, names), (b, b_axes), wanted)


def _mix_in_groups(eqn: Any, lazy: LazyWeight, h: jax.Array, roles: _Roles) -> jax.Array:
    """Contract the `rank` channels of each group with that group's part of B."""
    group, groups, out = lazy.new_axis(), roles.groups, roles.out
    at = out if roles.feature_groups > 1 else eqn.params["dimension_numbers"].out_spec[0]
    names = [RANK if i == out else Axis((), -2 - i) for i in range(h.ndim)]
    wanted = [*names[:out], group, roles.outer, *names[out + 1 :]]
    names.insert(at, group)
    h = h.reshape(*h.shape[:at], groups, h.shape[at] // groups, *h.shape[at + 1 :])
    b = named_axes.arrange(lazy.b, lazy.b_axes, [RANK, roles.outer], lazy.sizes)
    b = b.reshape(b.shape[0], groups, b.shape[1] // groups)
    y = _product(eqn, lazy, (h, names), (b, [RANK, group, roles.outer]), wanted)
    return y.reshape(*y.shape[:out], y.shape[out] * y.shape[out + 1], *y.shape[out + 2 :])


Named = tuple[jax.Array, Sequence[Axis]]


def _product(eqn: Any, lazy: LazyWeight, x: Named, b: Named, wanted: Sequence[Axis]) -> jax.Array:
    compute, accumulate = branch_dtypes(x[0].dtype, lazy)
    y, names = named_axes.contract(
        x[0].astype(compute),
        x[1],
        b[0].astype(compute),
        b[1],
        wanted,
        precision=eqn.params["precision"],
        preferred_element_type=accumulate,
    )
    return named_axes.arrange(y, names, wanted, {})
