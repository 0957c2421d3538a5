"""How the arrays of a quantized weight are sharded: as the weight is, by whole blocks."""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.quantized.kind import Kind
from lora_jax.core.quantized.weight import QuantizedWeight


def parts_of(entry: Any, mesh: Any) -> int:
    """Return into how many parts an entry of a `PartitionSpec` divides an axis."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def entries_of(sharding: NamedSharding | None, ndim: int) -> tuple[Any, ...]:
    """Return one entry of the specification per axis; None for all without a sharding."""
    if sharding is None:
        return (None,) * ndim
    return (*sharding.spec, *(None for _ in range(ndim - len(sharding.spec))))


def has_whole_blocks(kind: Kind, shape: Sequence[int], axis: int, sharding: NamedSharding) -> bool:
    """Return whether every device has whole blocks of a weight, if it is divided into blocks."""
    if kind.block is None:
        return True
    parts = parts_of(entries_of(sharding, len(shape))[axis], sharding.mesh)
    return shape[axis] % (parts * kind.block) == 0


def entries_by_field(weight: QuantizedWeight, entries: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the names of the axes of each array, from those of the weight; empty if it has none.

    An array with one entry for the whole blocked axis has no name there.
    """

    def one(name: str) -> tuple[Any, ...]:
        own, shape = list(entries), getattr(weight.fields[name], "shape", None)
        is_one = weight.format.fields[name].per_weight == 0 or (shape and shape[weight.axis] == 1)
        if own and is_one:
            own[weight.axis] = None
        return tuple(own)

    return {name: one(name) for name in weight.fields}


def field_shardings(weight: QuantizedWeight, sharding: NamedSharding) -> dict[str, NamedSharding]:
    """Return how each array of a weight is sharded that is itself sharded like this.

    An array with one entry for the whole blocked axis, such as one scale per output, is not sharded
    along it.
    """
    entries = list(entries_of(sharding, weight.ndim))

    def one(name: str) -> NamedSharding:
        size = weight.fields[name].shape[weight.axis]
        own = list(entries)
        if size % parts_of(entries[weight.axis], sharding.mesh):
            own[weight.axis] = None
        return sharding.update(spec=PartitionSpec(*own))

    return {name: one(name) for name in weight.fields}
