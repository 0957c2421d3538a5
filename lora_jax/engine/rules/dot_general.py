"""Rules for contractions: x·W + (x·A)·(scale·B), for every orientation of W."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.engine import jaxprs
from lora_jax.engine import products as branches
from lora_jax.engine.arithmetic import apply_gain, drop, side_that_takes_gain
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import Axis, LazyWeight, is_lazy
from lora_jax.engine.products import Product, is_shareable
from lora_jax.engine.rules.indexing import rows_as_activation
from lora_jax.engine.rules.registry import Rule, rule

RULES: dict[str, Rule] = {}


@rule(RULES, "dot_general")
def _dot_general(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """x·W + (x·A)·(scale·B), for every orientation of W and every choice of its axes."""
    args = rows_as_activation(eqn, args)
    if not any(map(is_lazy, args)):
        return jaxprs.bind(eqn, args)
    weight_is_left = _weight_is_left(*args)
    lazy, x = args if weight_is_left else args[::-1]
    if is_lazy(x):
        contracted, batched = (dims[weight_is_left] for dims in _dimensions(eqn))
        x = _as_activation(ctx, eqn, x, contracted, batched)
    product, batch = _product(eqn, lazy, x, weight_is_left)
    summed = [axis for axis in product.x_axes if axis not in product.out_axes]
    ctx.record(lazy, eqn, summed=summed, batch=batch)
    takes_gain = side_that_takes_gain(lazy, product.x_axes, product.out_axes)
    if takes_gain is None:
        return NotImplemented
    if takes_gain == "x":
        x = apply_gain(x, product.x_axes, lazy)
        product = dataclasses.replace(product, x=x)
    operands = (lazy.w, x) if weight_is_left else (x, lazy.w)
    y = None if lazy.w is None else jaxprs.bind(eqn, operands)[0]
    if lazy.a is None:
        return [y]
    meets_a = set(summed) <= set(lazy.a_axes)
    if lazy.probe:
        return [branches.observed(y, product) if meets_a and summed else y]
    if meets_a:
        product = dataclasses.replace(product, x=drop(x, lazy, ctx.next_site()))
    half = ctx.hidden.pop(id(eqn), product)
    total = branches.adapted(y, half, eqn.outvars[0].aval.dtype, ctx.forms)
    total = total if batch else ctx.name_sum(total)  # policies tell products with batch axes apart
    return [apply_gain(total, product.out_axes, lazy) if takes_gain == "out" else total]


def share(ctx: Context, products: Sequence[tuple[Any, Sequence[Any]]]) -> None:
    """Compute x·A of several equations that meet the same activation, where that can be shared."""
    found: dict[Any, list[tuple[Any, Product]]] = defaultdict(list)
    for eqn, args in products:
        if sum(map(is_lazy, args)) == 1:
            lazy, x = sorted(args, key=is_lazy, reverse=True)
            if lazy.a is not None and lazy.w is not None and not lazy.origin.looked_up:
                product, _ = _product(eqn, lazy, x, is_lazy(args[0]))
                after = side_that_takes_gain(lazy, product.x_axes, product.out_axes) == "out"
                if after and is_shareable(product):
                    found[product.compute].append((eqn, product))
    for group in found.values():
        if len(group) > 1:
            hiddens = branches.share([product for _, product in group], ctx.forms)
            ctx.hidden.update({id(eqn): h for (eqn, _), h in zip(group, hiddens, strict=True)})


def _weight_is_left(left: Any, right: Any) -> bool:
    """Of two lazy operands the right one is the weight, unless it is rows that were looked up."""
    if is_lazy(left) and is_lazy(right):
        return bool(right.origin.indexed) and not left.origin.indexed
    return is_lazy(left)


def _as_activation(
    ctx: Context, eqn: Any, lazy: LazyWeight, summed: Sequence[int], batch: Sequence[int]
) -> jax.Array:
    """The dense form of a weight that meets another weight."""
    if not ctx.infers:
        return ctx.densify(lazy, eqn, " (both sides are adapted)")
    axes = lazy.axes
    ctx.record(lazy, eqn, [axes[i] for i in summed], [axes[i] for i in batch], is_operand=True)
    return lazy.w


def _product(
    eqn: Any, lazy: LazyWeight, x: jax.Array, weight_is_left: bool
) -> tuple[Product, list[Axis]]:
    """The product that a `dot_general` is, and the weight's batch axes in it."""
    contracted, batched = (dims[::-1] if weight_is_left else dims for dims in _dimensions(eqn))
    x_axes: list[Axis] = [Axis((), -2 - i) for i in range(x.ndim)]
    for x_dims, w_dims in (contracted, batched):
        for x_dim, w_dim in zip(x_dims, w_dims, strict=True):
            x_axes[x_dim] = lazy.axes[w_dim]
    batch = [lazy.axes[i] for i in batched[1]]
    summed = [lazy.axes[i] for i in contracted[1]]
    x_free = [axis for axis in x_axes if axis not in summed and axis not in batch]
    w_free = [axis for axis in lazy.axes if axis not in summed and axis not in batch]
    out = [*batch, *w_free, *x_free] if weight_is_left else [*batch, *x_free, *w_free]
    return Product.of(lazy, x, x_axes, out, eqn.params["precision"]), batch


def _dimensions(eqn: Any) -> Any:
    """((left, right) contracted, (left, right) batched)."""
    return eqn.params["dimension_numbers"]
