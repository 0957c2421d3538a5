"""The branch `(x·A)·(scale·B)` of a product, in the form that is fast for its shapes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import compute_dtype
from lora_jax.core.sharding.meshes import is_on_mesh
from lora_jax.engine import named_axes
from lora_jax.engine.arithmetic import add, cast_for_branch, multiply_along
from lora_jax.engine.forms import Forms
from lora_jax.engine.lazy_weight import RANK, ROW, STATIC, Axis, LazyWeight
from lora_jax.engine.probes import observe
from lora_jax.engine.provenance import Provenance

#: The axis that several axes of an activation become in a flattened product.
TOKENS = Axis((), -1_000_000)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """An activation times a weight's factors, `x·a·b`, with a name for every axis."""

    lazy: LazyWeight
    x: Any  # the activation, or None where another product contains it
    _: dataclasses.KW_ONLY
    x_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    out_axes: tuple[Axis, ...] = dataclasses.field(metadata=STATIC)
    shape: tuple[int, ...] = dataclasses.field(metadata=STATIC)  # of x
    dtype: Any = dataclasses.field(metadata=STATIC)  # of x
    # whether axes of x may be flattened: on a mesh that could gather them
    can_flatten: bool = dataclasses.field(metadata=STATIC)
    precision: Any = dataclasses.field(metadata=STATIC, default=None)

    @classmethod
    def of(
        cls,
        lazy: LazyWeight,
        x: jax.Array,
        x_axes: Sequence[Axis],
        out_axes: Sequence[Axis],
        precision: Any = None,
    ) -> "Product":
        """Return the product of `x`, its axes named by `x_axes`; the result's are `out_axes`."""
        return cls(
            # What the numbers do not depend on is left out, so that JAX traces products of the same
            # shapes once.
            dataclasses.replace(
                lazy, w=None, gain=None, gain_axes=(), served=None, origin=Provenance(())
            ),
            x,
            x_axes=tuple(x_axes),
            out_axes=tuple(out_axes),
            shape=x.shape,
            dtype=x.dtype,
            can_flatten=not is_on_mesh(x),
            precision=precision,
        )

    @property
    def compute(self) -> Any:
        """The dtype that the branch multiplies in."""
        return compute_dtype(self.dtype, self.lazy.dtype)

    def contract(
        self,
        x: jax.Array,
        x_axes: Sequence[Axis],
        f: jax.Array,
        f_axes: Sequence[Axis],
        keep: Any,
        narrow: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Contract `x` or `x·A` with a factor, over the axes that are not in `keep`."""
        x, f, result = cast_for_branch(x, f, self.lazy, self.dtype, narrow)
        options = {"precision": self.precision, "preferred_element_type": result}
        return named_axes.contract(x, x_axes, f, f_axes, keep, **options)

    @property
    def sizes(self) -> dict[Hashable, int]:
        """The size of every axis of the activation and of the weight."""
        return self.lazy.sizes | dict(zip(self.x_axes, self.shape, strict=True))

    def factors(self) -> tuple[tuple[jax.Array, tuple[Axis, ...]], ...]:
        """Return A and B, in the order that takes fewer operations.

        A first for `x @ w`, B first for `x @ w.T`. The two are never multiplied with each other.
        """
        lazy = self.lazy
        pair = (lazy.a, lazy.a_axes), (lazy.b, lazy.b_axes)
        sizes = named_axes.sizes_of(*pair) | self.sizes

        def operations(order: Sequence[tuple[jax.Array, tuple[Axis, ...]]]) -> int:
            (_, first), (_, second) = order
            inner = named_axes.result_names(self.x_axes, first, {*second, *self.out_axes})
            return named_axes.flops(self.x_axes, first, sizes) + named_axes.flops(
                inner, second, sizes
            )

        return min((pair, pair[::-1]), key=operations)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """A product after its first half, `h = x · first factor`."""

    product: Product
    h: jax.Array
    _: dataclasses.KW_ONLY
    axes: tuple[Any, ...] = dataclasses.field(metadata=STATIC)
    # sizes of the axes that TOKENS stands for; empty where none does
    tokens: tuple[int, ...] = dataclasses.field(metadata=STATIC)


@functools.partial(jax.jit, static_argnames=("dtype", "forms"))
def add_update(
    y: jax.Array | None, product: Product | Hidden, dtype: Any, forms: Forms
) -> jax.Array:
    """Return `y + x·a·b` in `dtype`, its axes in the order of `out_axes`; a `y` of None is zero.

    Jitted, so that JAX traces, differentiates and lowers products of the same shapes once.
    """
    hidden = product if isinstance(product, Hidden) else _first_half(product, forms)
    # A result in float32 takes an update in float32, whatever its operands are.
    update = _second_half(hidden, narrow=forms.narrow and jnp.dtype(dtype).itemsize <= 2)
    return add(y, _apart(update, forms), dtype)


def _apart(x: jax.Array, forms: Forms) -> jax.Array:
    """Return `x` as an array that the compiler cannot tell to be the base product's too.

    Its cotangent passes the same barrier, so the products of the gradients stay apart as well.
    """
    return lax.optimization_barrier(x) if forms.apart else x


def _first_half(product: Product, forms: Forms) -> Hidden:
    flat, tokens = flatten_tokens(product) if forms.flatten else (product, ())
    (f, f_axes), (_, s_axes) = flat.factors()
    x, keep = _apart(flat.x, forms), {*s_axes, *flat.out_axes}
    h, axes = flat.contract(x, flat.x_axes, f, f_axes, keep, forms.narrow)
    return Hidden(flat, _scaled(h, axes, flat.lazy), axes=axes, tokens=tokens)


def _scaled(h: jax.Array, axes: Sequence[Any], lazy: LazyWeight) -> jax.Array:
    """Return `h`, its axes named, times the scale that is not in B."""
    return multiply_along(h, axes, lazy.scale, lazy.scale_axes)


def _second_half(hidden: Hidden, narrow: bool) -> jax.Array:
    product, out_axes = hidden.product, hidden.product.out_axes
    _, (s, s_axes) = product.factors()
    y, y_axes = product.contract(hidden.h, hidden.axes, s, s_axes, {*out_axes}, narrow)
    y = named_axes.arrange(y, y_axes, out_axes, product.sizes)
    if not hidden.tokens:
        return y
    at = out_axes.index(TOKENS)
    return lax.reshape(y, (*y.shape[:at], *hidden.tokens, *y.shape[at + 1 :]))


def tap_inputs(y: Any, product: Product) -> Any:
    """Return `y`, with the activation tapped where it meets A of a probe."""
    flat, _ = flatten_tokens(product)
    keep = {*flat.lazy.b_axes, *flat.out_axes}

    def first(x: jax.Array, a: jax.Array) -> jax.Array:
        # Lose nothing to the fast reduced-precision modes of an accelerator.
        options = {"precision": lax.Precision.HIGHEST}
        return named_axes.contract(x, flat.x_axes, a, flat.lazy.a_axes, keep, **options)[0]

    return observe(y, flat.x, flat.lazy, first)


def flatten_tokens(product: Product) -> tuple[Product, tuple[int, ...]]:
    """Flatten the longest run of token axes; return the product and the sizes of those axes."""
    lazy, x, shape = product.lazy, product.x, product.shape
    # runs: stretches of adjacent axes of x that the weight does not have
    known = {*lazy.axes, *lazy.a_axes, *lazy.b_axes}
    runs = [
        list(run)
        for free, run in itertools.groupby(
            range(len(shape)), lambda i: product.x_axes[i] not in known
        )
        if free
    ]
    run = max(runs, key=len, default=[])
    if len(run) < 2 or not product.can_flatten:
        return product, ()
    # x: [*before, *tokens, *after] -> [*before, TOKENS, *after], and the result alike
    start, stop = run[0], run[-1] + 1
    tokens, axes = shape[start:stop], product.x_axes[start:stop]
    at = product.out_axes.index(axes[0])
    shape = (*shape[:start], math.prod(tokens), *shape[stop:])
    return dataclasses.replace(
        product,
        x=None if x is None else lax.reshape(x, shape),
        x_axes=(*product.x_axes[:start], TOKENS, *product.x_axes[stop:]),
        out_axes=(*product.out_axes[:at], TOKENS, *product.out_axes[at + len(axes) :]),
        shape=shape,
    ), tokens


# --- weights that meet the same activation --------------------------------------------------------


def is_shareable(product: Product) -> bool:
    """Return whether the first half is a plain product `[tokens, in] · [in, rank]`.

    With dropout every weight draws its own mask, so nothing is shared.
    """
    if product.lazy.key is not None:
        return False
    (f, f_axes), (_, s_axes) = product.factors()
    if ROW in f_axes and math.prod(product.shape) < f.size:
        return False  # joining every row's A would cost more than reading its few tokens again
    summed = {*product.x_axes} - {*product.out_axes}
    return {*f_axes} - {ROW} == {*summed, RANK} and not summed & {*s_axes}


def share(products: Sequence[Product], forms: Forms) -> list[Hidden]:
    """Compute the first halves of several products with the same `x` by one product."""
    first, *others = products
    others = [dataclasses.replace(p, x=None) for p in others]
    hs = _multiply_together(first, others, forms)
    return [
        _as_hidden(dataclasses.replace(p, x=None), h, forms)
        for p, h in zip(products, hs, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="forms")
def _multiply_together(
    first: Product, others: Sequence[Product], forms: Forms
) -> Sequence[jax.Array]:
    flats = [flatten_tokens(p)[0] if forms.flatten else p for p in (first, *others)]
    rows = [axis for axis in flats[0].x_axes if axis == ROW and ROW in flats[0].lazy.a_axes]
    parts = []  # each first factor as [rank, *in], or [rows, rank, *in]
    for p in flats:
        (f, f_axes), _ = p.factors()
        ins = (axis for axis in p.x_axes if axis in f_axes and axis not in rows)
        wanted = (*rows, RANK, *ins)
        parts.append(named_axes.arrange(f.astype(p.compute), f_axes, wanted, {}))
    # [*tokens, *in] · [all ranks, *in] -> [*tokens, all ranks], the rows before the tokens
    first = flats[0]
    summed = [i for i, axis in enumerate(first.x_axes) if axis not in first.out_axes]
    batch = [first.x_axes.index(axis) for axis in rows]
    x, f, result = cast_for_branch(
        *(_apart(first.x, forms), lax.concatenate(parts, len(rows))),
        first.lazy,
        narrow=forms.narrow,
    )
    h = lax.dot_general(
        x,
        f,
        ((summed, range(len(rows) + 1, f.ndim)), (batch, range(len(rows)))),
        precision=first.precision,
        preferred_element_type=result,
    )
    return lax.split(h, [part.shape[len(rows)] for part in parts], axis=h.ndim - 1)


def _as_hidden(product: Product, h: jax.Array, forms: Forms) -> Hidden:
    flat, tokens = flatten_tokens(product) if forms.flatten else (product, ())
    free = [axis for axis in flat.x_axes if axis in flat.out_axes and axis != ROW]
    free = [*(axis for axis in flat.x_axes if axis == ROW), *free]
    axes = (*free, RANK)
    return Hidden(flat, _scaled(h, axes, flat.lazy), axes=axes, tokens=tokens)
