"""Parts of a quantized weight: which of its codes and scales make one."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array

#: Start, end and stride along an axis.
Bounds = tuple[int, int, int]


def blocked_axis(w: QuantizedWeight) -> int:
    """Return the axis that is divided into blocks, counted from the front."""
    return w.ndim + w.axis


def block_count(w: QuantizedWeight) -> int:
    """Return how many blocks the blocked axis has."""
    return w.shape[w.axis] // w.block


def holds_for_all(w: QuantizedWeight, field: str) -> bool:
    """Return whether an array has one entry for all of the blocked axis."""
    per_weight = w.format.fields[field].per_weight
    return per_weight == 0 or (per_weight is None and block_count(w) == 1)


def is_loose(w: QuantizedWeight) -> bool:
    """Return whether any part of the blocked axis is a block, with the scale of the whole.

    There is one block, its codes are not packed, and their number is not fixed.
    """
    fixed = w.format.per_block is None and w.format.block is not None
    alone = [holds_for_all(w, n) or x.shape[w.axis] == w.shape[w.axis] for n, x in w.fields.items()]
    return block_count(w) == 1 and not fixed and all(alone)


def with_fields(
    w: QuantizedWeight, fn: Callable[[jax.Array], jax.Array], at: int
) -> QuantizedWeight:
    """Return the weight with `fn` of each array, which then has its blocks along axis `at`."""
    fields = {name: fn(x) for name, x in w.fields.items()}
    return QuantizedWeight(fields, w.kind, at - fields[w.format.codes].ndim, w.dtype)


def slice_weight(w: QuantizedWeight, bounds: Sequence[Bounds]) -> QuantizedWeight | None:
    """Return a slice of a weight, `bounds` along each axis; None where it divides a block.

    >>> from lora_jax.core.quantized.weight import quantize_array
    >>> w = quantize_array(jnp.ones((2, 64)), "int4", axis=1)
    >>> slice_weight(w, [(0, 2, 1), (32, 64, 1)]).shape, slice_weight(w, [(0, 2, 1), (3, 64, 1)])
    ((2, 32), None)
    """
    at = blocked_axis(w)
    fields: dict[str, jax.Array] = {}
    for name, x in w.fields.items():
        own = _bounds_of(w, name, bounds[at])
        if own is None:
            return None
        mine = [*bounds[:at], own, *bounds[at + 1 :]]
        whole = all(b == (0, n, 1) for b, n in zip(mine, x.shape, strict=True))
        fields[name] = x if whole else lax.slice(x, *zip(*mine, strict=True))
    return dataclasses.replace(w, fields=fields)


def _bounds_of(w: QuantizedWeight, field: str, bounds: Bounds) -> Bounds | None:
    """Return the bounds along the blocked axis of one of the arrays."""
    start, limit, stride = bounds
    size, block, entries = w.shape[w.axis], w.block, w.fields[field].shape[w.axis]
    if bounds == (0, size, 1):
        return 0, entries, 1
    if limit <= start:
        return None
    if is_loose(w):
        return (0, entries, 1) if holds_for_all(w, field) else bounds
    if stride != 1 or start % block or limit % block:
        return None
    if holds_for_all(w, field):
        return 0, entries, 1
    per_block = entries // block_count(w)
    return start // block * per_block, limit // block * per_block, 1


def rows_of(w: QuantizedWeight, rows: Sequence[int], axis: int) -> jax.Array:
    """Return the values with these indices of one axis; only they are dequantized.

    Where blocks lie along that axis, all of the weight is.
    """
    index = (*(slice(None) for _ in range(axis)), jnp.asarray(rows))
    if axis != blocked_axis(w):
        return dequantize_array(with_fields(w, lambda x: x[index], blocked_axis(w)))
    if is_loose(w):
        fields = {n: x if holds_for_all(w, n) else x[index] for n, x in w.fields.items()}
        return dequantize_array(dataclasses.replace(w, fields=fields))
    return dequantize_array(w)[index]
