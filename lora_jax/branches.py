"""The branch `(x·A)·(scale·B)` of a product, in the form that is fast for its shapes."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from lora_jax import _contract
from lora_jax.forms import Forms
from lora_jax.lazy import RANK, Axis, LazyWeight, branch_dtypes

#: The one axis that several axes of an activation become in a flattened product.
TOKENS = Axis((), -1_000_000)


@dataclasses.dataclass(frozen=True)
class Product:
    """An activation that meets an adapted weight: `x · (w + a·b)`, every axis with its name."""

    lazy: LazyWeight
    x: jax.Array
    x_axes: tuple[Axis, ...]
    out_axes: tuple[Axis, ...]
    precision: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the branch's two products."""
        accumulate = branch_dtypes(self.x, self.lazy)[1]
        return {"precision": self.precision, "preferred_element_type": accumulate}

    @property
    def compute(self) -> Any:
        """The dtype that the branch multiplies in."""
        return branch_dtypes(self.x, self.lazy)[0]

    def factors(self) -> tuple[tuple[jax.Array, tuple[Axis, ...]], ...]:
        """A and B, that first which makes the smaller intermediate and fewer operations.

        A for `x @ w`, B for `x @ w.T`. The two are never multiplied with each other.
        """
        lazy = self.lazy
        pair = (lazy.a, lazy.a_axes), (lazy.b, lazy.b_axes)
        sizes = _contract.sizes_of((self.x, self.x_axes), *pair) | lazy.sizes

        def operations(order: Sequence[tuple[jax.Array, tuple[Axis, ...]]]) -> int:
            (_, first), (_, second) = order
            inner = _contract.result_names(self.x_axes, first, {*second, *self.out_axes})
            return _contract.flops(self.x_axes, first, sizes) + _contract.flops(
                inner, second, sizes
            )

        return min((pair, pair[::-1]), key=operations)


class Hidden(NamedTuple):
    """A product that has come as far as `h = x · first factor`."""

    product: Product
    tokens: tuple[int, ...]  # sizes of the axes that TOKENS stands for; empty where none does
    h: jax.Array
    axes: tuple[Any, ...]


def branch(product: Product, forms: Forms) -> jax.Array:
    """`x · a · b`, its axes in the order of `out_axes`."""
    product, tokens = flattened(product) if forms.flatten else (product, ())
    (f, f_axes), (_, s_axes) = product.factors()
    x, f = product.x.astype(product.compute), f.astype(product.compute)
    keep = {*s_axes, *product.out_axes}
    h, axes = _contract.contract(x, product.x_axes, f, f_axes, keep, **product.options)
    return from_hidden(Hidden(product, tokens, h, axes))


def from_hidden(hidden: Hidden) -> jax.Array:
    """The branch from its first half: `h` times the second factor."""
    product, tokens, h, h_axes = hidden
    out_axes, compute = product.out_axes, product.compute
    _, (s, s_axes) = product.factors()
    h, s = h.astype(compute), s.astype(compute)
    y, y_axes = _contract.contract(h, h_axes, s, s_axes, {*out_axes}, **product.options)
    sizes = product.lazy.sizes | _contract.sizes_of((product.x, product.x_axes))
    y = _contract.arrange(y, y_axes, out_axes, sizes)
    if not tokens:
        return y
    at = out_axes.index(TOKENS)
    return lax.reshape(y, (*y.shape[:at], *tokens, *y.shape[at + 1 :]))


def flattened(product: Product, x: jax.Array | None = None) -> tuple[Product, tuple[int, ...]]:
    """The product with its longest run of token axes as one, and the sizes of those axes.

    `x` is the flattened activation, where another product has it already.
    """
    lazy, shape = product.lazy, product.x.shape
    known = {*lazy.axes, *lazy.a_axes, *lazy.b_axes}
    runs = [
        list(run)
        for free, run in itertools.groupby(
            range(len(shape)), lambda i: product.x_axes[i] not in known
        )
        if free
    ]
    run = max(runs, key=len, default=[])
    # Merging axes that an explicit mesh shards would need a sharding of its own.
    if len(run) < 2 or any(axis is not None for axis in jax.typeof(product.x).sharding.spec):
        return product, ()
    start, stop = run[0], run[-1] + 1
    tokens, axes = shape[start:stop], product.x_axes[start:stop]
    at = product.out_axes.index(axes[0])
    if x is None:
        x = lax.reshape(product.x, (*shape[:start], math.prod(tokens), *shape[stop:]))
    return dataclasses.replace(
        product,
        x=x,
        x_axes=(*product.x_axes[:start], TOKENS, *product.x_axes[stop:]),
        out_axes=(*product.out_axes[:at], TOKENS, *product.out_axes[at + len(axes) :]),
    ), tokens


# --- weights that meet the same activation --------------------------------------------------------


def is_shareable(product: Product) -> bool:
    """Whether the first factor meets the activation in a plain product `[tokens, in] · [in, rank]`.

    Dropout draws a mask of its own for every weight, so there nothing is shared.
    """
    if product.lazy.key is not None:
        return False
    (_, f_axes), (_, s_axes) = product.factors()
    summed = {*product.x_axes} - {*product.out_axes}
    return {*f_axes} == {*summed, RANK} and not summed & {*s_axes}


def share(products: Sequence[Product], forms: Forms) -> list[Hidden]:
    """The first halves of several weights' branches on the same `x`, by one product."""
    first, tokens = flattened(products[0]) if forms.flatten else (products[0], ())
    flats = [flattened(p, first.x)[0] if tokens else p for p in products]
    parts = []
    for p in flats:
        (f, f_axes), _ = p.factors()
        wanted = (RANK, *(axis for axis in p.x_axes if axis in f_axes))
        parts.append(_contract.arrange(f.astype(p.compute), f_axes, wanted, {}))
    summed = [i for i, axis in enumerate(first.x_axes) if axis not in first.out_axes]
    h = lax.dot_general(
        first.x.astype(first.compute),
        lax.concatenate(parts, 0),
        ((summed, range(1, len(summed) + 1)), ((), ())),
        **first.options,
    )
    hs = lax.split(h, [len(part) for part in parts], axis=h.ndim - 1)
    free = [(*(axis for axis in p.x_axes if axis in p.out_axes), RANK) for p in flats]
    return [Hidden(p, tokens, h, axes) for p, h, axes in zip(flats, hs, free, strict=True)]
