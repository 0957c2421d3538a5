"""Read a leaf from PyTorch's tensors straight into its shards, a block of a tensor at a time.

In memory are then the shards of this process and one block; a CPU takes the shards as they are.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    mine = shards_of(like)
    over = fill(place, tensors, mine.values(), place.layers())
    return to_devices(like, mine), over


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf that stays in its files until its values are asked for.

    Attributes:
      place: where it is in PyTorch's files.
      tensors: as in `read`.
      dtype: of its values.
    """

    place: Place
    tensors: Mapping[str, Any]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.place.shape

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def astype(self, dtype: Any) -> "StoredLeaf":
        """Return the leaf in another dtype."""
        return replace(self, dtype=jnp.dtype(dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._read(self.shape, self.place.layers())
        return values if dtype is None else values.astype(dtype, copy=False)

    def layer(self, where: tuple[int, ...]) -> np.ndarray:
        """Read one layer, whose index is as in `Place.layers`; its stacked axes have size 1."""
        sizes = zip(self.place.at(where), self.shape, strict=True)
        one = tuple(1 if isinstance(index, int) else size for index, size in sizes)
        return self._read(one, [(where, dict(self.place.layers())[where])])

    def parts(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield each layer, with where it starts in the leaf."""
        for where, _ in self.place.layers():
            at = self.place.at(where)
            yield tuple(i if isinstance(i, int) else 0 for i in at), self.layer(where)

    def _read(self, shape: tuple[int, ...], layers: Sequence[tuple]) -> np.ndarray:
        first = [
            index if isinstance(index, int) and len(layers) == 1 else 0
            for index in self.place.at(layers[0][0])
        ]
        ranges = tuple((n, n + size) for n, size in zip(first, shape, strict=True))
        shard = _Shard(ranges, empty(shape, self.dtype))
        fill(self.place, self.tensors, [shard], layers)
        return shard.values


def stored_blocks(
    leaf: StoredLeaf, place: Place, where: tuple[int, ...]
) -> Iterator[np.ndarray] | None:
    """Return one layer's tensor in parts, in a file's order, if its axes are those of the leaf's.

    Args:
      leaf: stays in a file.
      place: the leaf's in the file that is to be written.
      where: the layer, as in `Place.layers`.
    """
    (name, *others) = dict(leaf.place.layers())[where]
    tensor = leaf.tensors[name]
    axes = lambda place: (place.permutation(), place.torch_shape)
    if (
        others
        or not hasattr(tensor, "rows")
        or not axes(place)[0]
        or axes(place) != axes(leaf.place)
    ):
        return None
    steps = row_ranges(tensor)
    return (tensor.rows(start, stop).astype(leaf.dtype, copy=False) for start, stop in steps)


def row_ranges(tensor: Any) -> list[tuple[int, int]]:
    """Return the parts of the first axis that are read at a time."""
    bytes_of_row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, BLOCK // max(1, bytes_of_row))
    size = tensor.shape[0]
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def fill(
    place: Place, tensors: Mapping[str, Any], shards: Collection["_Shard"], layers: Sequence[tuple]
) -> tuple[tuple[str, ...], ...]:
    """Read these layers into shards, and return the names of the tensors that overflow them."""
    over: dict[tuple[str, ...], None] = {}
    for where, names in layers:
        at = place.at(where)
        for block in blocks_of_layer(place, names, tensors):
            meets = [(shard, found) for shard in shards if (found := shard.meet(at, block.ranges))]
            if not meets:
                continue
            values = block.read()
            for shard, (into, part) in meets:
                if shard.write(into, values[part]):
                    over[names] = None
    return tuple(over)


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
        return overflows(values, self.values[into])


def shards_of(like: Any) -> dict[Ranges, _Shard]:
    """Return the distinct parts of a leaf, or of its shape, that devices of this process hold."""
    sharding = sharding_of(like)
    parts: Any = [(slice(None),) * len(like.shape)]
    if sharding is not None:
        parts = sharding.addressable_devices_indices_map(like.shape).values()
    found: dict[Ranges, _Shard] = {}
    for index in parts:
        ranges = _ranges(index, like.shape)
        if ranges not in found:
            shape = tuple(stop - start for start, stop in ranges)
            found[ranges] = _Shard(ranges, empty(shape, like.dtype))
    return found


def sharding_of(like: Any) -> jax.sharding.NamedSharding | None:
    """Return the `NamedSharding` of an array or a shape, or None."""
    sharding = getattr(like, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _ranges(index: Any, shape: tuple[int, ...]) -> Ranges:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of any values, aligned so that a device of the CPU takes it as it is."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def to_devices(like: Any, shards: Mapping[Ranges, _Shard]) -> jax.Array:
    """Return the leaf of shards that were filled, sharded as `like`."""
    sharding = sharding_of(like)
    if sharding is None:
        (only,) = shards.values()
        return jax.device_put(only.values)
    return jax.make_array_from_callback(
        like.shape, sharding, lambda index: shards[_ranges(index, like.shape)].values
    )


@dataclass(frozen=True)
class Block:
    """A part of one layer of a leaf: its ranges along the layer's axes, and how it is read."""

    ranges: Ranges
    read: Callable[[], np.ndarray]


def blocks_of_layer(
    place: Place, names: tuple[str, ...], tensors: Mapping[str, Any], whole: int | None = None
) -> Iterator[Block]:
    """Yield the parts of one layer: blocks of a tensor's rows, or the layer at once.

    Args:
      place: of the leaf.
      names: of the layer's tensors.
      tensors: as in `read`.
      whole: an axis of the layer that no part divides.
    """
    permutation, tensor = place.permutation(), tensors[names[0]]
    is_divided = whole is not None and permutation[whole : whole + 1] == (0,)
    if not permutation or is_divided or not hasattr(tensor, "rows"):
        at = place.at(place.layers()[0][0])
        sizes = [n for i, n in zip(at, place.shape, strict=True) if not isinstance(i, int)]
        yield Block(tuple((0, n) for n in sizes), lambda: _layer(place, names, tensors))
        return
    for start, stop in row_ranges(tensor):
        ranges = ((start, stop), *((0, n) for n in tensor.shape[1:]))
        read = partial(_transposed_rows, tensor, start, stop, permutation)
        yield Block(tuple(ranges[axis] for axis in permutation), read)


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


def overflows(x: np.ndarray, cast: np.ndarray) -> bool:
    """Return whether finite values of `x` are not finite in the dtype that they were cast to."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    if jnp.finfo(x.dtype).max <= jnp.finfo(cast.dtype).max:
        return False
    return not np.isfinite(cast).all() and bool(np.isfinite(x).sum() > np.isfinite(cast).sum())
