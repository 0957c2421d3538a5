"""The branch `(x·A)·(scale·B)` of a product, in the form that is fast for its shapes."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

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


def branch(product: Product, forms: Forms, hidden: jax.Array | None = None) -> jax.Array:
    """`x · a · b`, its axes in the order of `out_axes`.

    `hidden` is `x · first factor` where `shared_hidden` has computed it already.
    """
    flat, free = flattened(product) if forms.flatten else (product, ())
    lazy, out_axes, compute = flat.lazy, flat.out_axes, flat.compute
    (f, f_axes), (s, s_axes) = flat.factors()
    f, s = f.astype(compute), s.astype(compute)
    if hidden is None:
        keep = {*s_axes, *out_axes}
        x = flat.x.astype(compute)
        h, h_axes = _contract.contract(x, flat.x_axes, f, f_axes, keep, **flat.options)
    else:
        h, h_axes = hidden, _hidden_axes(flat)
    h = h.astype(compute)
    y, y_axes = _contract.contract(h, h_axes, s, s_axes, {*out_axes}, **flat.options)
    sizes = _contract.sizes_of((flat.x, flat.x_axes), (f, f_axes), (s, s_axes)) | lazy.sizes
    y = _contract.arrange(y, y_axes, out_axes, sizes)
    if not free:
        return y
    at = out_axes.index(TOKENS)
    return lax.reshape(y, (*y.shape[:at], *(n for _, n in free), *y.shape[at + 1 :]))


def flattened(product: Product) -> tuple[Product, tuple[tuple[Axis, int], ...]]:
    """The product with its longest run of token axes as one, and those axes with their sizes."""
    x, lazy = product.x, product.lazy
    known = {*lazy.axes, *lazy.a_axes, *lazy.b_axes}
    positions = range(x.ndim)
    runs = [
        list(run)
        for free, run in itertools.groupby(positions, lambda i: product.x_axes[i] not in known)
        if free
    ]
    run = max(runs, key=len, default=[])
    # Merging axes that an explicit mesh shards would need a sharding of its own.
    if len(run) < 2 or any(axis is not None for axis in jax.typeof(x).sharding.spec):
        return product, ()
    start, stop = run[0], run[-1] + 1
    axes = product.x_axes[start:stop]
    at = product.out_axes.index(axes[0])
    return dataclasses.replace(
        product,
        x=lax.reshape(x, (*x.shape[:start], math.prod(x.shape[start:stop]), *x.shape[stop:])),
        x_axes=(*product.x_axes[:start], TOKENS, *product.x_axes[stop:]),
        out_axes=(*product.out_axes[:at], TOKENS, *product.out_axes[at + len(axes) :]),
    ), tuple(zip(axes, x.shape[start:stop], strict=True))


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


def shared_hidden(products: Sequence[Product], forms: Forms) -> Sequence[jax.Array]:
    """`x · first factor` of several weights that meet the same `x`, from one product."""
    flats = [flattened(p)[0] if forms.flatten else p for p in products]
    parts = []
    for p in flats:
        (f, f_axes), _ = p.factors()
        wanted = (RANK, *(axis for axis in p.x_axes if axis in f_axes))
        parts.append(_contract.arrange(f.astype(p.compute), f_axes, wanted, {}))
    first = flats[0]
    summed = [i for i, axis in enumerate(first.x_axes) if axis not in first.out_axes]
    together = lax.concatenate(parts, 0)
    h = lax.dot_general(
        first.x.astype(first.compute),
        together,
        ((summed, range(1, together.ndim)), ((), ())),
        **first.options,
    )
    return lax.split(h, [len(part) for part in parts], axis=h.ndim - 1)


def _hidden_axes(product: Product) -> tuple[Axis, ...]:
    return (*(axis for axis in product.x_axes if axis in product.out_axes), RANK)
