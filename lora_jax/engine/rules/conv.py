"""The rule for convolutions: one factor convolves with the window, the other mixes channels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.sharding.meshes import unshard
from lora_jax.engine import named_axes
from lora_jax.engine.arithmetic import add, cast_for_branch, to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.contraction import Branch, Equation, contract_weight
from lora_jax.engine.lazy_weight import RANK, Axis, LazyWeight, is_lazy
from lora_jax.engine.probes import observe
from lora_jax.engine.rules.registry import PrimitiveRule, rule

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "conv_general_dilated")
def _conv(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Convolve with A to `rank` channels, then mix them with B as a 1×1 convolution, or B first.

    The weight is the kernel, or the image that an activation convolves.
    """
    is_kernel = is_lazy(args[1])
    x, lazy = args if is_kernel else args[::-1]
    if is_lazy(x):
        x = ctx.densify(x, eqn, " (both sides are adapted)")
    roles = Roles.of(eqn, lazy, is_kernel)
    x_axes, out_axes = ([Axis((), -2 - i) for i in range(x.ndim)] for _ in range(2))
    out_axes[roles.out] = roles.outer
    if roles.groups == 1:  # otherwise the channels of x are those of all groups
        x_axes[roles.x_inner] = roles.inner
    equation = Equation(eqn, not is_kernel, [roles.inner, *roles.window], [])
    return contract_weight(ctx, equation, ConvBranch(lazy, x_axes, out_axes, eqn, roles), x)


@dataclasses.dataclass(frozen=True)
class Roles:
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
    def of(cls, eqn: Any, lazy: LazyWeight, is_kernel: bool) -> "Roles":
        """Read the roles from the equation's dimension numbers."""
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
        """The number of groups, of features or of the batch."""
        return self.feature_groups * self.batch_groups


@dataclasses.dataclass(frozen=True)
class ConvBranch(Branch):
    """The branch of a convolution: `B·(A ∗ x)`, or `A ∗ (B·x)` as a backward pass has it."""

    eqn: Any
    roles: Roles

    def first_factor(self) -> str | None:
        """Return "a" where A has the weight's inputs, "b" where the layout's outputs are them."""
        roles = self.roles
        a, b = set(self.lazy.a_axes) - {RANK}, set(self.lazy.b_axes) - {RANK}
        if b <= {roles.outer} and a <= {roles.inner, *roles.window}:
            return "a" if roles.is_kernel or roles.batch_groups == 1 else None
        if b <= {roles.inner} and a <= {roles.outer, *roles.window} and roles.groups == 1:
            return "b"
        return None

    @property
    def takes_sum(self) -> bool:
        """Return whether one convolution with W + A·B takes the place of two and the branch."""
        # In 16 bits the sum would lose digits of A·B, and dropout is on the inputs of A.
        lazy = self.lazy
        return self._is_small and lazy.w is not None and lazy.dtype.itemsize > 2

    @property
    def _is_small(self) -> bool:
        """Return whether the weight takes fewer operations, and less memory, than its factors.

        An output position costs groups·rank·window·inner for A, which each group has whole, and
        rank·outer for B. A depthwise kernel, which has one window per output, costs less.
        """
        roles, sizes = self.roles, self.lazy.sizes
        if roles.groups == 1 or not roles.is_kernel or self.lazy.probe or self.lazy.key is not None:
            return False
        summed = math.prod(sizes[axis] for axis in (roles.inner, *roles.window))
        outer = sizes[roles.outer]
        return self.lazy.rank * (roles.groups * summed + outer) >= summed * outer

    def add_to(self, y: Any, x: jax.Array, ctx: Context) -> jax.Array:
        """Return `y` plus a convolution with A, and a product with B after it or before it."""
        roles = self.roles
        if self._is_small:
            delta = to_dense(dataclasses.replace(self.lazy, w=None, gain=None))
            update = self._bind(x, delta)
        elif self.first_factor() == "b":
            h = self._mix(x, roles.x_inner, roles.inner, RANK)
            update = self._convolve(h, self.lazy.a, roles.inner)
        else:
            h = self._convolve(x, self.lazy.a, roles.outer)
            in_groups = roles.groups > 1 and roles.is_kernel
            mix = self._mix_in_groups if in_groups else self._mix
            update = mix(h, roles.out, RANK, roles.outer)
        return add(y, update, self.eqn.outvars[0].aval.dtype)

    def tap(self, y: Any, x: jax.Array) -> Any:
        """Return `y`, with the windows of `x` tapped; `y` alone where the weight is the image."""
        if not self.roles.is_kernel:
            return y

        def first(x: jax.Array, a: jax.Array) -> jax.Array:
            return self._convolve(x, a, self.roles.outer)

        windows = y.size // y.shape[self.roles.out] * self.roles.groups
        return observe(y, x, self.lazy, first, windows)

    def _convolve(self, x: jax.Array, a: jax.Array, replaced: Axis) -> jax.Array:
        """Convolve with A in the weight's place, RANK in the place of one of the weight's axes."""
        lazy, roles = self.lazy, self.roles
        # a: as the weight, RANK in place of `replaced`; every group has the same A
        wanted = [RANK if axis == replaced else axis for axis in lazy.axes]
        a = named_axes.arrange(a, lazy.a_axes, wanted, lazy.sizes)
        if roles.is_kernel and roles.feature_groups > 1:
            a = jnp.concatenate([a] * roles.feature_groups, wanted.index(RANK))
        changes: dict[str, Any] = {"batch_group_count": 1}
        sharding = self.eqn.params.get("out_sharding")
        if sharding is not None and replaced == roles.outer:
            changes["out_sharding"] = unshard(sharding, roles.out)  # RANK is there
        return self._bind(x, a, **changes)

    def _bind(self, x: jax.Array, w: jax.Array, **changes: Any) -> jax.Array:
        """Return the equation's convolution with `w` in the weight's place."""
        x, w, accumulate = cast_for_branch(x, w, self.lazy)
        params = self.eqn.params | {"preferred_element_type": accumulate} | changes
        operands = (x, w) if self.roles.is_kernel else (w, x)
        return lax.conv_general_dilated(*operands, **params)

    def _mix(self, x: jax.Array, at: int, summed: Axis, made: Axis) -> jax.Array:
        """Contract axis `at` of `x`, which is `summed`, with B; the result has `made` there."""
        lazy = self.lazy
        x_axes = [summed if i == at else Axis((), -2 - i) for i in range(x.ndim)]
        out_axes = [made if axis == summed else axis for axis in x_axes]
        b_axes = [RANK, made if summed == RANK else summed]
        b = named_axes.arrange(lazy.b, lazy.b_axes, b_axes, lazy.sizes)  # [rank, outer or inner]
        return self._contract(x, x_axes, b, b_axes, out_axes)

    def _mix_in_groups(self, h: jax.Array, at: int, rank: Axis, outer: Axis) -> jax.Array:
        """Contract the `rank` channels of each group, at axis `at`, with that group's part of B."""
        lazy, groups, group = self.lazy, self.roles.groups, self.lazy.new_axis()
        # h: [..., groups·rank, ...] -> [..., groups, rank, ...]; groups of the batch: at the batch
        numbers = self.eqn.params["dimension_numbers"]
        split = at if self.roles.feature_groups > 1 else numbers.out_spec[0]
        h_axes = [rank if i == at else Axis((), -2 - i) for i in range(h.ndim)]
        out_axes = [*h_axes[:at], group, outer, *h_axes[at + 1 :]]
        h_axes.insert(split, group)
        h = h.reshape(*h.shape[:split], groups, h.shape[split] // groups, *h.shape[split + 1 :])
        # b: [rank, outer] -> [rank, groups, outer per group]
        b = named_axes.arrange(lazy.b, lazy.b_axes, [rank, outer], lazy.sizes)
        b = b.reshape(b.shape[0], groups, b.shape[1] // groups)
        y = self._contract(h, h_axes, b, [rank, group, outer], out_axes)
        # y: [..., groups, outer per group, ...] -> [..., outer, ...]
        return y.reshape(*y.shape[:at], y.shape[at] * y.shape[at + 1], *y.shape[at + 2 :])

    def _contract(
        self,
        x: jax.Array,
        x_axes: Sequence[Axis],
        b: jax.Array,
        b_axes: Sequence[Axis],
        out_axes: Sequence[Axis],
    ) -> jax.Array:
        """Contract `x` with a form of B; the result's axes are in the order of `out_axes`."""
        x, b, accumulate = cast_for_branch(x, b, self.lazy)
        y, axes = named_axes.contract(
            x,
            x_axes,
            b,
            b_axes,
            out_axes,
            precision=self.eqn.params["precision"],
            preferred_element_type=accumulate,
        )
        return named_axes.arrange(y, axes, out_axes, {})
