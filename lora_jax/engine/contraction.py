"""`contract_weight`: what happens wherever an activation meets an adapted weight."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import stretches
from lora_jax.engine.arithmetic import apply_gain, drop, side_that_takes_gain, to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import Axis, LazyWeight
from lora_jax.engine.products import Product, add_update, tap_inputs
from lora_jax.engine.quantized.merge_aware import served_view, straight_through
from lora_jax.engine.quantized.view import QuantizedView, multiply


@dataclasses.dataclass(frozen=True)
class Equation:
    """A contraction of the program: how it runs on the base, and what it does with its axes."""

    eqn: Any
    weight_is_left: bool
    summed: Sequence[Axis]  # axes of the weight
    batch: Sequence[Axis]  # axes of the weight
    others: Sequence[Any] = ()  # inputs behind the weight and the activation
    shape: tuple[int, ...] | None = None  # of the result, where its axis of rows is set apart

    def on(self, w: Any, x: jax.Array, tie: str | None) -> jax.Array:
        """Return the output for this weight and this activation; `tie` is as in `Forms`."""
        if isinstance(w, QuantizedView):
            key = (stretches.spelling(self.eqn) or id(self.eqn), self.weight_is_left, self.shape)
            bind = dataclasses.replace(self, others=())._bind  # kept by JAX, so without arrays
            return multiply(bind, w, x, self.others, key, tie)
        return self._bind(w, x, *self.others)

    def _bind(self, w: jax.Array, x: jax.Array, *others: Any) -> jax.Array:
        if self.shape is not None:
            x = x.reshape(self.eqn.invars[self.weight_is_left].aval.shape)
        operands = (w, x) if self.weight_is_left else (x, w)
        y = stretches.bind(self.eqn, (*operands, *others))[0]
        return y if self.shape is None else y.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Branch(abc.ABC):
    """The branch `(x·A)·(scale·B)` of a contraction: which axes meet, and how to multiply.

    An axis of the activation or of the result that is the weight's too has the weight's name for
    it in `x_axes` or `out_axes`.
    """

    lazy: LazyWeight
    x_axes: Sequence[Axis]
    out_axes: Sequence[Axis]

    @abc.abstractmethod
    def first_factor(self) -> str | None:
        """Return the factor that meets the activation: "a" for `x @ w`, "b" for `x @ w.T`.

        None where products with the factors cannot take the weight's place.
        """

    @property
    def takes_sum(self) -> bool:
        """Return whether `x·(W + A·B)` costs less than `x·W` and the branch."""
        return False

    @abc.abstractmethod
    def add_to(self, y: Any, x: jax.Array, ctx: Context) -> jax.Array:
        """Return `y` plus the branch on `x`, in the dtype of the result; None stands for zero."""

    def mark(self, total: jax.Array, ctx: Context) -> jax.Array:
        """Return the output, marked where a `jax.checkpoint` policy may look for it."""
        return total

    @abc.abstractmethod
    def tap(self, y: Any, x: jax.Array) -> Any:
        """Return `y`, with `x` tapped where it meets the A of a probe."""


def contract_weight(ctx: Context, equation: Equation, branch: Branch, x: jax.Array) -> Any:
    """Return the outputs of a contraction of `x` with an adapted weight, or NotImplemented.

    `x·W + (x·A)·(scale·B)`, and DoRA's gain on the side that has its axes; a weight that is smaller
    than what its factors take (a depthwise kernel) is summed up first. While uses are inferred it
    is `x·W` alone.
    """
    lazy = branch.lazy
    ctx.record(lazy, equation.eqn, equation.summed, equation.batch)
    if lazy.a is None:
        return [equation.on(lazy.w, x, ctx.forms.tie)]
    side = side_that_takes_gain(lazy, branch.x_axes, branch.out_axes)
    if side is None or branch.first_factor() is None:
        return NotImplemented
    if branch.takes_sum:
        return [equation.on(to_dense(lazy), x, ctx.forms.tie)]
    if lazy.served is not None and lazy.w is not None:
        return [_merged_product(ctx, equation, branch, x, side)]
    if side == "x":
        x = apply_gain(x, branch.x_axes, lazy)
    y = None if lazy.w is None else equation.on(lazy.w, x, ctx.forms.tie)  # a tangent has no base
    total = add_branch(ctx, branch, y, x)
    return [apply_gain(total, branch.out_axes, lazy) if side == "out" else total]


def _merged_product(
    ctx: Context, equation: Equation, branch: Branch, x: jax.Array, side: str
) -> jax.Array:
    """Return `x·Q(W + A·B)`, in which A and B, and a gain, get the gradient of `x·(W + A·B)`.

    No dW is formed: of the second product only what their gradients need is computed.
    """
    lazy, still, tie = branch.lazy, lax.stop_gradient(x), ctx.forms.tie
    y = equation.on(served_view(lazy), x, tie)
    if side == "x":
        still = apply_gain(still, branch.x_axes, lazy)  # x is not differentiated, the gain is
    base = None if lazy.gain is None else equation.on(lazy.w, still, tie)
    total = add_branch(ctx, branch, base, still)
    like = apply_gain(total, branch.out_axes, lazy) if side == "out" else total
    return branch.mark(straight_through(y, like), ctx)


def add_branch(ctx: Context, branch: Branch, y: Any, x: jax.Array) -> Any:
    """Return `y` plus the branch, with dropout on the inputs of A; a probe taps them instead."""
    meets_a = branch.first_factor() == "a"
    if branch.lazy.probe:
        return branch.tap(y, x) if meets_a else y
    if meets_a:
        x = drop(x, branch.x_axes, branch.lazy, ctx.next_site())
    return branch.add_to(y, x, ctx)


@dataclasses.dataclass(frozen=True)
class DotBranch(Branch):
    """The branch of a product over named axes: what `x_axes` has and `out_axes` lacks is summed."""

    dtype: Any  # of the result
    precision: Any = None

    @property
    def summed(self) -> set[Axis]:
        """The axes that are summed over."""
        return {*self.x_axes} - {*self.out_axes}

    def first_factor(self) -> str:
        """Return "a" where A has all axes that are summed over, else "b"."""
        return "a" if self.summed <= {*self.lazy.a_axes} else "b"

    def product(self, x: jax.Array) -> Product:
        """Return the branch on `x` as a product that can be shared and jitted."""
        return Product.of(self.lazy, x, self.x_axes, self.out_axes, self.precision)

    def add_to(self, y: Any, x: jax.Array, ctx: Context) -> jax.Array:
        """Return `y` plus the branch on `x`."""
        return add_update(y, self.product(x), self.dtype, ctx.forms)

    def tap(self, y: Any, x: jax.Array) -> Any:
        """Return `y`, with `x` tapped; where nothing is summed over, A has no inputs."""
        return tap_inputs(y, self.product(x)) if self.summed else y
