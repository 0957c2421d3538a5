"""Read a leaf from PyTorch's tensors straight into codes, a block of a tensor at a time.

In memory are then the codes of this process and one block of floating numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.weight import QuantizedWeight, quantize_array
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.reading import (
    Ranges,
    blocks_of_layer,
    overflows,
    shards_of,
    to_devices,
)


def read_quantized(
    place: Place, tensors: Mapping[str, Any], like: QuantizedWeight
) -> tuple[QuantizedWeight, tuple[tuple[str, ...], ...]]:
    """Read one leaf and quantize it, to the codes that its whole values give.

    Args:
      place: where it is in PyTorch's files.
      tensors: as in `reading.read`.
      like: the kind, the axis, and shapes in place of its arrays, with the `NamedSharding` of each
        where they lie on a mesh. The values are rounded to its dtype before they are quantized.

    Returns:
      As `reading.read`.

    Raises:
      ConfigError: the leaf contains NaN, infinity, or numbers too large for the kind.
    """
    shards = {name: shards_of(x) for name, x in like.fields.items()}
    axis = _axis_of_layer(place, like)
    over: dict[tuple[str, ...], None] = {}
    for where, names in place.layers():
        at = place.at(where)
        for block in blocks_of_layer(place, names, tensors, whole=axis):
            meets = [
                (name, shard, found)
                for name, parts in shards.items()
                for shard in parts.values()
                if (found := shard.meet(at, _ranges(block.ranges, axis, like, name)))
            ]
            if not meets:
                continue
            values = block.read()
            rounded = _round(values, like.dtype)
            if overflows(values, rounded):
                over[names] = None
            codes = _encode(rounded, like.kind, axis - rounded.ndim)
            if not all(map(_is_finite, (rounded, *codes.values()))) and names not in over:
                raise ConfigError(
                    f"quantize: {place.path}: contains NaN, infinity or numbers too large for "
                    f"{like.kind}; leave it out"
                )
            for name, shard, (into, part) in meets:
                shard.write(into, codes[name][part])
    fields = {name: to_devices(x, shards[name]) for name, x in like.fields.items()}
    return dataclasses.replace(like, fields=fields), tuple(over)


def _axis_of_layer(place: Place, like: QuantizedWeight) -> int:
    """Return the axis of the blocks among the axes of one layer."""
    at = place.at(place.layers()[0][0])
    return sum(not isinstance(index, int) for index in at[: like.axis])


def _ranges(ranges: Ranges, axis: int, like: QuantizedWeight, name: str) -> Ranges:
    """Return the ranges of a field that belong to those of a block; `axis` is whole in both."""
    return (*ranges[:axis], (0, like.fields[name].shape[like.axis]), *ranges[axis + 1 :])


def _round(values: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # told by the caller
        return np.ascontiguousarray(values.astype(dtype, copy=False))


def _encode(values: np.ndarray, kind: str, axis: int) -> dict[str, np.ndarray]:
    return jax.device_get(dict(_quantize(jnp.asarray(values), kind, axis).fields))


def _is_finite(x: np.ndarray) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(np.isfinite(x).all())


_quantize = jax.jit(quantize_array, static_argnames=("kind", "axis"))
