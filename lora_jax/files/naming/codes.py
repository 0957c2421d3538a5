"""Quantized tensors of a file, and the leaves that they become: codes move, field by field.

A tensor that is stored as codes has, beside `shape` and `dtype`, a method `codes()`. It returns a
`QuantizedWeight` with PyTorch's axes, or None if its numbers have no kind here. The fields are
arrays, or stay in the file until `np.asarray` (or their method `rows(start, stop)`) reads them.
`codes()` itself reads nothing. `to_tree` reads such a tensor into a leaf that `like` says is a
`QuantizedWeight`; `leaf_like` makes one of the shapes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ModelFileError, StructureError
from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.reading import fill, sharding_of, shards_of, to_devices


def codes_of(tensor: Any) -> QuantizedWeight | None:
    """Return the codes of a tensor, or None if it is not stored as codes of a known kind."""
    return tensor.codes() if hasattr(tensor, "codes") else None


def is_stored_as(place: Place, tensor: Any, like: QuantizedWeight) -> bool:
    """Return whether a tensor is stored as the codes of a leaf, in the same blocks."""
    try:
        codes = codes_of(tensor)
        if codes is None or codes.kind != like.kind:
            return False
        own = leaf_like(place, codes, jax.ShapeDtypeStruct(like.shape, like.dtype))
    except (StructureError, ModelFileError):  # it can be read as floats only
        return False
    arrays = lambda w: {name: (tuple(x.shape), jnp.dtype(x.dtype)) for name, x in w.fields.items()}
    return own.axis == like.axis and arrays(own) == arrays(like)


def has_codes(place: Place, tensors: Mapping[str, Any], like: Any) -> bool:
    """Return whether `read_codes` can read a leaf: all of its tensors are stored as it says."""
    names = [name for _, names in place.layers() for name in names]
    return isinstance(like, QuantizedWeight) and all(
        is_stored_as(place, tensors[name], like) for name in names
    )


def leaf_like(place: Place, codes: QuantizedWeight, like: Any) -> QuantizedWeight:
    """Return the shapes of a leaf whose tensors are stored as codes.

    Args:
      place: where the leaf is in PyTorch's files.
      codes: of one of its tensors.
      like: the shape and dtype of the weight, and its `NamedSharding` if it has one. Fields are
        sharded as the weight, except along a blocked axis whose shards are not whole blocks.

    Raises:
      StructureError: the blocks of the tensor are not blocks along one axis of the leaf.
    """
    axis = _leaf_axis(place, codes)
    size, whole = like.shape[axis], codes.shape[codes.axis]
    fields = {}
    for name, field in codes.fields.items():
        shape = list(like.shape)
        shape[axis] = max(1, field.shape[codes.axis] * size // whole)
        sharding = _sharding(sharding_of(like), tuple(shape), axis, size // codes.block)
        fields[name] = jax.ShapeDtypeStruct(tuple(shape), field.dtype, sharding=sharding)
    return QuantizedWeight(fields, codes.kind, axis, like.dtype)


def _leaf_axis(place: Place, codes: QuantizedWeight) -> int:
    """Return the leaf's axis, counted from its end, along which a tensor's blocks are."""
    left, right = place.entry.groups(len(place.shape))
    blocked = codes.axis % len(left)
    letter = left[blocked][-1]
    (axis,) = (i for i, group in enumerate(right) if letter in group)
    joined = len(place.entry.torch_names) > 1 or len(place.entry.paths) > 1
    size = place.sizes[letter]
    block = min(codes.block, size) if codes.block == place.torch_shape[blocked] else codes.block
    is_part = right[axis] == left[blocked][-len(right[axis]) :]
    if not is_part or size % block or (joined and blocked == place.entry.out_axis):
        raise StructureError(
            f"{place.path}: cannot keep the codes of {place.entry.torch_names[0]}: blocks of "
            f"{block} ({codes.kind}) along PyTorch's axis {blocked} do not stay whole in a leaf of "
            f"shape {place.shape}. Load it as floats"
        )
    return axis - len(right)


def _sharding(sharding: Any, shape: tuple[int, ...], axis: int, blocks: int) -> Any:
    """Return the sharding of a field, or None."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
    if blocks % parts or shape[axis] % parts:
        spec[axis] = None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def read_codes(
    place: Place, tensors: Mapping[str, Any], like: QuantizedWeight
) -> tuple[QuantizedWeight, tuple[tuple[str, ...], ...]]:
    """Read one leaf from tensors that are stored as codes, one tensor after the other.

    Args:
      place: where it is in PyTorch's files.
      tensors: by name; see the module.
      like: from `leaf_like`.

    Returns:
      The leaf, and the names of the tensors with values that are not finite in its dtype.
    """
    over: dict[tuple[str, ...], None] = {}
    places = {name: field_place(place, like, name) for name in like.fields}
    shards = {name: shards_of(field) for name, field in like.fields.items()}
    for where, names in place.layers():
        codes = {name: tensors[name].codes() for name in names}
        if not all(_fits(one, like.dtype) for one in codes.values()):
            over[names] = None
        for field, part in places.items():
            arrays = {name: _whole(x.fields[field], x.axis, part) for name, x in codes.items()}
            fill(part, arrays, shards[field].values(), [(where, names)])
    fields = {name: to_devices(like.fields[name], found) for name, found in shards.items()}
    return dataclasses.replace(like, fields=fields), tuple(over)


def _fits(codes: QuantizedWeight, dtype: Any) -> bool:
    """Return whether values are finite in a dtype; those of float32's range are not looked at."""
    if dtype != jnp.float16:
        return True
    fields = {name: jnp.asarray(np.asarray(x)) for name, x in codes.fields.items()}
    return bool(_is_finite(dataclasses.replace(codes, fields=fields, dtype=jnp.dtype(dtype))))


_is_finite = jax.jit(lambda w: jnp.isfinite(dequantize_array(w)).all())


def field_place(place: Place, like: QuantizedWeight, name: str) -> Place:
    """Return the place of one field: that of the weight, shorter along the blocked axis."""
    shape = tuple(like.fields[name].shape)
    letter = place.entry.groups(len(shape))[1][like.axis][-1]
    sizes = {x: size for x, size in place.entry.sizes.items() if x != letter}
    return dataclasses.replace(
        place, shape=shape, entry=dataclasses.replace(place.entry, sizes=sizes)
    )


def _whole(field: Any, axis: int, place: Place) -> Any:
    """Return a tensor's field; one entry for the whole axis is repeated where that is divided."""
    size = place.torch_shape[axis]
    return field if field.shape[axis] == size else np.repeat(field, size, axis)
