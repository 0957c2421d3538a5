"""How the arrays of a quantized weight are sharded where the weight is, or should be."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.quantized.parts import block_count, blocked_axis, is_loose
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.engine.quantized.view import QuantizedView


def specs_of(
    w: QuantizedWeight, spec: Iterable[Any], sizes: Mapping[Any, int], other: Any = None
) -> dict[str, PartitionSpec]:
    """Return how each array of a weight is sharded that is sharded as `spec` says, by name.

    Args:
      w: the weight.
      spec: one entry per axis, or fewer.
      sizes: of the axes of the mesh.
      other: the entry of the blocked axis of an array which the mesh does not divide.
    """
    entries, at = _entries(w, spec), blocked_axis(w)
    parts = _parts(entries[at], sizes)
    found: dict[str, PartitionSpec] = {}
    for name, x in w.fields.items():
        entry = entries[at] if x.shape[at] % parts == 0 else None if x.shape[at] == 1 else other
        found[name] = PartitionSpec(*entries[:at], entry, *entries[at + 1 :])
    return found


def shardings_of(view: QuantizedView, sharding: Any) -> QuantizedView:
    """Return a view with the sharding of each array in its place, None where nothing is said."""
    none = jax.tree.map(lambda _: None, view)
    if not isinstance(sharding, NamedSharding) or not view.is_movable:
        return none
    specs = specs_of(view.weight, sharding.spec, sharding.mesh.shape)
    fields = {name: sharding.update(spec=spec) for name, spec in specs.items()}
    return dataclasses.replace(none, weight=dataclasses.replace(none.weight, fields=fields))


def view_of_specs(view: QuantizedView, spec: Any, sizes: Mapping[Any, int]) -> QuantizedView:
    """Return a view with the spec of each array in its place; scalars are on every device."""
    everywhere = jax.tree.map(lambda _: PartitionSpec(), view)
    fields = specs_of(view.weight, spec, sizes)
    weight = dataclasses.replace(everywhere.weight, fields=fields)
    return dataclasses.replace(everywhere, weight=weight)


def divides(w: QuantizedWeight, spec: Iterable[Any], sizes: Mapping[Any, int]) -> bool:
    """Return whether each device's part of a weight is a weight: whole blocks, or one scale."""
    entries = _entries(w, spec)
    return block_count(w) % _parts(entries[w.axis], sizes) == 0 or is_loose(w)


def _entries(w: QuantizedWeight, spec: Iterable[Any]) -> list[Any]:
    given = list(spec)
    return [*given, *[None] * (w.ndim - len(given))]


def _parts(entry: Any, sizes: Mapping[Any, int]) -> int:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(sizes[name] for name in (entry if isinstance(entry, tuple) else (entry,)))
