"""How the arrays of a quantized weight are sharded where the weight is, or should be."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.quantized.parts import block_count, is_loose
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.sharding.quantized import (
    entries_of,
    field_shardings,
    field_specs,
    parts_of,
)
from lora_jax.engine.quantized.view import QuantizedView


def shardings_of(view: QuantizedView, sharding: Any) -> QuantizedView:
    """Return a view with the sharding of each array in its place, None where nothing is said."""
    none = jax.tree.map(lambda _: None, view)
    if not isinstance(sharding, NamedSharding) or not view.is_movable:
        return none
    fields = field_shardings(view.weight, sharding)
    return dataclasses.replace(none, weight=dataclasses.replace(none.weight, fields=fields))


def view_of_specs(view: QuantizedView, spec: Any, sizes: Mapping[Any, int]) -> QuantizedView:
    """Return a view with the spec of each array in its place; scalars are on every device."""
    everywhere = jax.tree.map(lambda _: PartitionSpec(), view)
    fields = field_specs(view.weight, spec, sizes)
    weight = dataclasses.replace(everywhere.weight, fields=fields)
    return dataclasses.replace(everywhere, weight=weight)


def divides(w: QuantizedWeight, spec: Iterable[Any], sizes: Mapping[Any, int]) -> bool:
    """Return whether each device's part of a weight is a weight: whole blocks, or one scale."""
    entry = entries_of(spec, w.ndim)[w.axis]
    return block_count(w) % parts_of(entry, sizes) == 0 or is_loose(w)
