"""How the arrays of a quantized weight are sharded: as the weight is, by whole blocks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.quantized.kind import Kind
from lora_jax.core.quantized.weight import QuantizedWeight


def parts_of(entry: Any, sizes: Mapping[Any, int]) -> int:
    """Return into how many parts an entry of a `PartitionSpec` divides an axis.

    Args:
      entry: the names of mesh axes, one name, None or UNCONSTRAINED.
      sizes: of the axes of the mesh.
    """
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(sizes[name] for name in (entry if isinstance(entry, tuple) else (entry,)))


def entries_of(spec: Iterable[Any] | None, ndim: int) -> tuple[Any, ...]:
    """Return one entry of a specification per axis; None for all without one."""
    given = tuple(spec or ())
    return (*given, *(None for _ in range(ndim - len(given))))


def has_whole_blocks(kind: Kind, shape: Sequence[int], axis: int, sharding: NamedSharding) -> bool:
    """Return whether every device has whole blocks of a weight, if it is divided into blocks."""
    if kind.block is None:
        return True
    parts = parts_of(entries_of(sharding.spec, len(shape))[axis], sharding.mesh.shape)
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


def field_specs(
    weight: QuantizedWeight, spec: Iterable[Any], sizes: Mapping[Any, int], other: Any = None
) -> dict[str, PartitionSpec]:
    """Return how each array of a weight is sharded that is sharded as `spec` says, by name.

    An array with one entry for the whole blocked axis, such as one scale per output, is not sharded
    along it.

    Args:
      weight: the weight.
      spec: one entry per axis, or fewer.
      sizes: of the axes of the mesh.
      other: the entry of the blocked axis of an array which the mesh does not divide.
    """
    entries = list(entries_of(spec, weight.ndim))
    at = weight.ndim + weight.axis
    parts = parts_of(entries[at], sizes)
    found: dict[str, PartitionSpec] = {}
    for name, x in weight.fields.items():
        entry = entries[at] if x.shape[at] % parts == 0 else None if x.shape[at] == 1 else other
        found[name] = PartitionSpec(*entries[:at], entry, *entries[at + 1 :])
    return found


def field_shardings(weight: QuantizedWeight, sharding: NamedSharding) -> dict[str, NamedSharding]:
    """Return the sharding of each array of a weight that is itself sharded like this."""
    specs = field_specs(weight, sharding.spec, sharding.mesh.shape)
    return {name: sharding.update(spec=spec) for name, spec in specs.items()}
