"""Equations that JAX does not map over rows, or not without a copy of a weight for each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lora_jax.engine import jaxprs

#: What `bind_mapped` maps by itself.
MAPPED = {"ragged_dot_general", "pure_callback"}


def bind_mapped(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation for one row of many, as `jax.vmap` has it.

    A callback that does not say how it is mapped is called for one row after another. A ragged
    product of all rows with one weight is one ragged product.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "pure_callback" and params.get("vmap_method", "") is None:
        return jaxprs.bind(eqn, values, vmap_method="sequential")
    if name == "ragged_dot_general" and params["group_offset"] is None:
        x, w, sizes = values
        options = {name: params[name] for name in ("precision", "preferred_element_type")}
        numbers = params["ragged_dot_dimension_numbers"]
        return [mapped_ragged_dot(x, w, sizes, numbers, **options)]
    return jaxprs.bind(eqn, values)


def mapped_ragged_dot(
    x: jax.Array, w: jax.Array, sizes: jax.Array, numbers: Any, **options: Any
) -> jax.Array:
    """Return `lax.ragged_dot_general`, which `jax.vmap` maps without copies of an unmapped `w`."""
    product = custom_vmap(lambda x, w, n: lax.ragged_dot_general(x, w, n, numbers, **options))

    @product.def_vmap
    def many(size: int, is_mapped: Sequence[bool], *values: jax.Array) -> Any:
        pairs = zip(values, is_mapped, strict=True)
        x, w, sizes = (x if known else jnp.broadcast_to(x, (size, *x.shape)) for x, known in pairs)
        if is_mapped[1]:
            batch = numbers.dot_dimension_numbers[1][0]
            if batch and sizes.ndim == 2:
                sizes = jnp.expand_dims(sizes, range(1, 1 + len(batch)))
                lead = (size, *(x.shape[i + 1] for i in batch))
                sizes = jnp.broadcast_to(sizes, (*lead, sizes.shape[-1]))
            return lax.ragged_dot_general(x, w, sizes, _with_batch(numbers), **options), True
        return _merged(x, values[1], sizes, numbers, options), True

    return product(x, w, sizes)


def _merged(
    x: jax.Array, w: jax.Array, sizes: jax.Array, numbers: Any, options: Mapping[str, Any]
) -> jax.Array:
    """Return the ragged products of many rows with one weight as one: x and sizes `[rows, ...]`."""
    (x_summed, _), (x_batch, w_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if x_batch:
        count = x.shape[x_batch[0] + 1]
        each = sizes[:, None] if sizes.ndim == 2 else sizes
        each = jnp.broadcast_to(each, (len(each), count, *each.shape[2:]))
        one = lambda x, w, n: _merged(x, w, n, _without_batch(numbers), options)
        ys = jax.vmap(one)(
            jnp.moveaxis(x, x_batch[0] + 1, 0), jnp.moveaxis(w, w_batch[0], 0), each.swapaxes(0, 1)
        )
        return jnp.moveaxis(ys, 0, 1)
    if {ragged, *x_summed} != {*range(x.ndim - 1)} or ragged in x_summed:
        raise NotImplementedError("a ragged product with other axes than those of its entries")
    groups = _Merged.of(jnp.moveaxis(x, ragged + 1, 1), sizes)
    entries = jnp.moveaxis(groups.entries, 0, ragged)
    return groups.apart(lax.ragged_dot_general(entries, w, groups.sizes, numbers, **options))


def _without_batch(numbers: Any) -> Any:
    """Return the dimension numbers of a ragged product without its first axis of a batch."""
    x_batch, w_batch = numbers.dot_dimension_numbers[1]
    at_x, at_w = x_batch[0], w_batch[0]
    return _renumbered(numbers, lambda i: int(i - (i > at_x)), lambda i: int(i - (i > at_w)), 1)


def _with_batch(numbers: Any) -> Any:
    """Return the dimension numbers of a ragged product with another axis of a batch in front."""
    # JAX's own way gives numbers of NumPy, with which it does not lower a second axis of a batch.
    after = lambda i: int(i) + 1
    dims = _renumbered(numbers, after, after, 0)
    summed, (x_batch, w_batch) = dims.dot_dimension_numbers
    return lax.RaggedDotDimensionNumbers(
        (summed, ((0, *x_batch), (0, *w_batch))),
        dims.lhs_ragged_dimensions,
        dims.rhs_group_dimensions,
    )


def _renumbered(
    numbers: Any, in_x: Callable[[int], int], in_w: Callable[[int], int], skipped: int
) -> Any:
    """Return dimension numbers with other ones, and without the first `skipped` of the batch."""
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    batch = (list(map(in_x, x_batch[skipped:])), list(map(in_w, w_batch[skipped:])))
    return lax.RaggedDotDimensionNumbers(
        ((list(map(in_x, x_summed)), list(map(in_w, w_summed))), batch),
        list(map(in_x, numbers.lhs_ragged_dimensions)),
        list(map(in_w, numbers.rhs_group_dimensions)),
    )


@dataclasses.dataclass(frozen=True)
class _Merged:
    """The entries of all rows in common groups."""

    entries: jax.Array  # [rows * entries, ...], sorted by group
    sizes: jax.Array  # [groups]
    order: jax.Array  # [rows * entries]: where each of the entries was
    rows: int

    @classmethod
    def of(cls, x: jax.Array, sizes: jax.Array) -> "_Merged":
        """Merge the groups of rows: entries `[rows, entries, ...]`, sizes `[rows, groups]`."""
        group = jax.vmap(group_of_entries, (0, None))(sizes, x.shape[1]).reshape(-1)
        order = jnp.argsort(group)
        entries = x.reshape(-1, *x.shape[2:])[order]
        return cls(entries, sizes.sum(0, dtype=sizes.dtype), order, len(x))

    def apart(self, y: jax.Array) -> jax.Array:
        """Return `[rows * entries, ...]` as `[rows, entries, ...]`, each where it was."""
        return y[jnp.argsort(self.order)].reshape(self.rows, -1, *y.shape[1:])


def group_of_entries(sizes: jax.Array, entries: int) -> jax.Array:
    """Return the group of each entry, int32 `[entries]`, the number of groups for one in none.

    >>> group_of_entries(jnp.array([2, 0, 1]), 4).tolist()
    [0, 0, 2, 3]
    """
    ends = lax.cumsum(sizes.astype(jnp.int32))
    return (jnp.arange(entries, dtype=jnp.int32)[:, None] >= ends[None]).sum(-1, dtype=jnp.int32)
