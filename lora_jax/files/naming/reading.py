"""Read a leaf from PyTorch's tensors straight into its shards, a block of a tensor at a time.

In memory are then the shards of this process and one block; a CPU takes the shards as they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.files.naming.place import Place

#: Bytes of a tensor that are read at a time, if it can be read in parts.
BLOCK = 2**23
_ALIGNMENT = 64  # bytes: what XLA asks of an array that a CPU is to use without copying it

Ranges = tuple[tuple[int, int], ...]  # [start, stop) along each axis


def read(
    place: Place, tensors: Mapping[str, Any], like: Any
) -> tuple[jax.Array, tuple[tuple[str, ...], ...]]:
    """Read one leaf.

    Args:
      place: where it is in PyTorch's files.
      tensors: arrays by name, of the place's shapes. One with a method `rows(start, stop)` is read
        in parts, of which only those that this process needs.
      like: its shape, its dtype, and its `NamedSharding` if it has one. Otherwise it comes to the
        default device.

    Returns:
      The leaf, and the names of the tensors with finite values that are not finite in its dtype.
    """
    mine = _shards(like)
    over: dict[tuple[str, ...], None] = {}
    for where, names in place.layers():
        at = place.at(where)
        for block in _blocks(place, names, tensors):
            meets = [(x, found) for x in mine.values() if (found := x.meet(at, block.ranges))]
            if not meets:
                continue
            values = block.read()
            for shard, (into, part) in meets:
                if shard.write(into, values[part]):
                    over[names] = None
    return _to_devices(like, mine), tuple(over)


@dataclass(frozen=True)
class _Shard:
    """A part of a leaf, in host memory."""

    ranges: Ranges  # of the leaf
    values: np.ndarray

    def meet(self, at: tuple[Any, ...], ranges: Ranges) -> tuple[tuple, tuple] | None:
        """Return the indices here, and in a block, of what the two share; None for nothing.

        Args:
          at: the block's layer, as in `Place.at`.
          ranges: the block's, along the axes of one layer.
        """
        into: list[Any] = []
        part: list[slice] = []
        block = iter(ranges)
        for index, (first, end) in zip(at, self.ranges, strict=True):
            if isinstance(index, int):
                if not first <= index < end:
                    return None
                into.append(index - first)
                continue
            start, stop = next(block)
            low, high = max(first, start), min(end, stop)
            if low >= high:
                return None
            into.append(slice(low - first, high - first))
            part.append(slice(low - start, high - start))
        return tuple(into), tuple(part)

    def write(self, into: tuple, values: np.ndarray) -> bool:
        """Write a part, and return whether finite values of it overflow the dtype here."""
        with np.errstate(over="ignore", invalid="ignore"):
            self.values[into] = values
        return _overflows(values, self.values[into])


def _shards(like: Any) -> dict[Ranges, _Shard]:
    """Return the distinct parts of a leaf that devices of this process hold."""
    sharding = sharding_of(like)
    parts: Any = [(slice(None),) * len(like.shape)]
    if sharding is not None:
        parts = sharding.addressable_devices_indices_map(like.shape).values()
    found: dict[Ranges, _Shard] = {}
    for index in parts:
        ranges = _ranges(index, like.shape)
        if ranges not in found:
            shape = tuple(stop - start for start, stop in ranges)
            found[ranges] = _Shard(ranges, _empty(shape, like.dtype))
    return found


def sharding_of(like: Any) -> jax.sharding.NamedSharding | None:
    """Return the `NamedSharding` of an array or a shape, or None."""
    sharding = getattr(like, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _ranges(index: Any, shape: tuple[int, ...]) -> Ranges:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of any values, aligned so that a device of the CPU takes it as it is."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _to_devices(like: Any, shards: Mapping[Ranges, _Shard]) -> jax.Array:
    sharding = sharding_of(like)
    if sharding is None:
        (only,) = shards.values()
        return jax.device_put(only.values)
    return jax.make_array_from_callback(
        like.shape, sharding, lambda index: shards[_ranges(index, like.shape)].values
    )


@dataclass(frozen=True)
class _Block:
    """A part of one layer of a leaf: its ranges along the layer's axes, and how it is read."""

    ranges: Ranges
    read: Callable[[], np.ndarray]


def _blocks(place: Place, names: tuple[str, ...], tensors: Mapping[str, Any]) -> Iterator[_Block]:
    """Yield the parts of one layer: blocks of a tensor's rows, or the layer at once."""
    permutation, tensor = place.permutation(), tensors[names[0]]
    if not permutation or not hasattr(tensor, "rows"):
        at = place.at(place.layers()[0][0])
        whole = [n for i, n in zip(at, place.shape, strict=True) if not isinstance(i, int)]
        yield _Block(tuple((0, n) for n in whole), lambda: _layer(place, names, tensors))
        return
    bytes_of_row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, BLOCK // max(1, bytes_of_row))
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        ranges = ((start, stop), *((0, n) for n in tensor.shape[1:]))
        read = partial(_transposed_rows, tensor, start, stop, permutation)
        yield _Block(tuple(ranges[axis] for axis in permutation), read)


def _transposed_rows(
    tensor: Any, start: int, stop: int, permutation: tuple[int, ...]
) -> np.ndarray:
    return tensor.rows(start, stop).transpose(permutation)


def _layer(place: Place, names: tuple[str, ...], tensors: Mapping[str, Any]) -> np.ndarray:
    """Return one layer of the leaf from its tensors, read whole."""
    axis = place.entry.out_axis
    parts = [np.asarray(tensors[name]) for name in names]
    joined = np.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return place.weight_to_tree(place.part_of(joined))


def _overflows(x: np.ndarray, cast: np.ndarray) -> bool:
    """Return whether finite values of `x` are not finite in the dtype that they were cast to."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    if jnp.finfo(x.dtype).max <= jnp.finfo(cast.dtype).max:
        return False
    return not np.isfinite(cast).all() and bool(np.isfinite(x).sum() > np.isfinite(cast).sum())
