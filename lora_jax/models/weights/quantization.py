"""Which parameters of a model are quantized while they are loaded, and into which kinds."""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.config import ALL_LINEAR
from lora_jax.core.errors import ConfigError, TargetError, grouped
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import names_module, nearest
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized, quantize_array
from lora_jax.files.naming import Naming, Place

#: A kind for all linear layers; or a kind, or None for no kind, for what a pattern selects.
Quantize = str | Mapping[str, str | None]

_HEAD = "head/kernel"  # which all-linear leaves as it is, tied or not, as QLoRA does


def parse_quantize(quantize: Any) -> dict[str, str | None]:
    """Return a kind by pattern.

    Args:
      quantize: as in `models.load`.

    Raises:
      ConfigError: it is of another type, or a kind does not exist or cannot be written.

    >>> parse_quantize("nf4"), parse_quantize({"mlp": None, "all-linear": "int8"})
    ({'all-linear': 'nf4'}, {'mlp': None, 'all-linear': 'int8'})
    """
    table = {ALL_LINEAR: quantize} if isinstance(quantize, str) else quantize
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(
            f"quantize: {shown_value(quantize)} must be a kind, one of {', '.join(WRITABLE)}, or a "
            'mapping such as {"mlp": "nf4", "all-linear": "int8"}'
        )
    for pattern, kind in table.items():
        where = "quantize" if pattern == ALL_LINEAR else f"quantize: {shown_value(pattern)}"
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: a pattern must be a string")
        if kind is None or (isinstance(kind, str) and kind in WRITABLE):
            continue
        what = "can be read from files, but not written" if kind in KINDS else "is not a kind"
        raise ConfigError(
            f"{where}: {shown_value(kind)} {what}; choose one of {', '.join(WRITABLE)}"
        )
    return dict(table)


def quantized_shapes(like: Any, naming: Naming, quantize: Quantize) -> Any:
    """Return the shapes of a model's parameters, those to quantize as `QuantizedWeight`s of shapes.

    The blocks lie along the axis that a linear layer sums, and along the width of an embedding.

    Args:
      like: a tree of `ShapeDtypeStruct`s.
      naming: of its leaves.
      quantize: as in `models.load`.

    Raises:
      ConfigError: as `parse_quantize`; or blocks do not divide an axis: all such leaves are listed.
      TargetError: a pattern selects no weight of a layer.
    """
    table = parse_quantize(quantize)
    leaves, treedef = flatten_with_paths(like)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    weights = {path: place for path, place in places.items() if place.entry.kind}
    kinds: dict[str, str | None] = {}
    for pattern, kind in table.items():
        for path in _select(pattern, weights):
            kinds.setdefault(path, kind)  # the first pattern that selects it decides
    problems = []
    for path, kind in kinds.items():
        if kind is None:
            continue
        axis = _block_axis(places[path])
        make = partial(quantize_array, kind=kind, axis=axis)
        try:
            leaves[path] = jax.eval_shape(make, leaves[path])
        except ConfigError as error:
            problem = str(error).removeprefix("quantize: ")
            rest = f'quantize={{"{path}": None, "{ALL_LINEAR}": "{kind}"}}'
            problems.append(f"{path}: {problem}; choose another kind, or leave it out: {rest}")
    if problems:
        raise ConfigError("quantize: " + grouped(problems))
    return jax.tree_util.tree_unflatten(treedef, leaves.values())


def _select(pattern: str, weights: Mapping[str, Place]) -> list[str]:
    """Return the weights that a pattern selects: all-linear, a module, an end of a path, a regex.

    Raises:
      TargetError: there is none.
      ConfigError: the pattern is not a regular expression.
    """
    if pattern == ALL_LINEAR:
        linear = [path for path, place in weights.items() if place.entry.kind != "embedding"]
        return [path for path in linear if path != _HEAD]
    found = [path for path in weights if names_module(pattern, path)]
    if not found:
        try:
            found = [path for path in weights if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ConfigError(
                f"quantize: {shown(pattern)} is not a regular expression: {error}"
            ) from None
    if not found:
        raise TargetError(
            f"quantize: {shown(pattern)} selects no weight of a layer; {nearest(pattern, weights)}"
        )
    return found


def _block_axis(place: Place) -> int:
    """Return the axis of the blocks, counted from the end."""
    layout = place.entry.layout
    summed = "o" if place.entry.kind == "embedding" else "i"  # a lookup returns whole rows
    return layout.rindex(summed) - len(layout)


def on_mesh(path: str, like: Any, sharding: NamedSharding) -> Any:
    """Return the shape of a parameter, with the sharding of the parameter or of each of its fields.

    Raises:
      ConfigError: a shard of the blocked axis does not have whole blocks.
    """
    if not is_quantized(like):
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
    entries = [*sharding.spec, *(None for _ in range(like.ndim - len(sharding.spec)))]
    _check_blocks(path, like, entries[like.axis], sharding)

    def one(field: Any) -> jax.ShapeDtypeStruct:
        own = list(entries)
        if field.shape[like.axis] == 1:  # one entry for all blocks
            own[like.axis] = None
        where = NamedSharding(sharding.mesh, PartitionSpec(*own))
        return jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=where)

    fields = {name: one(field) for name, field in like.fields.items()}
    return QuantizedWeight(fields, like.kind, like.axis, like.dtype)


def _check_blocks(path: str, like: QuantizedWeight, entry: Any, sharding: NamedSharding) -> None:
    names = entry if isinstance(entry, tuple) else (entry,)
    parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
    blocks = like.shape[like.axis] // like.block
    if blocks > 1 and blocks % parts:
        along = "+".join(str(name) for name in names)
        raise ConfigError(
            f"quantize: {path}: axis {like.axis} of {list(like.shape)} has {blocks} blocks of "
            f"{like.block} ({like.kind}), which {along}={parts} does not divide; choose another "
            "kind, fewer devices along the axis, or rules= that do not shard it"
        )
