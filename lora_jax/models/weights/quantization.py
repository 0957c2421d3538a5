"""Which parameters of a model are quantized while they are loaded, and into which kinds."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.adapters.block_axis import choose_axis
from lora_jax.core.config import ALL_LINEAR
from lora_jax.core.errors import ConfigError, TargetError, grouped
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import names_module, nearest
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.quantized.layerwise import quantize_leaf
from lora_jax.files.naming import Naming, Place

KEEP = "keep"  # the codes in the file, see `weights.kept`
#: "keep"; a kind for all linear layers; or a kind, or None for no kind, for what a pattern selects.
Quantize = str | Mapping[str, str | None]

#: What all-linear leaves as it is, tied or not, as QLoRA does.
_HEADS = ("head/kernel", "classifier/kernel")


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
            f"quantize: {shown_value(quantize)} must be a kind ({', '.join(WRITABLE)}), {KEEP!r}, "
            'or a mapping such as {"mlp": "nf4", "all-linear": "int8"}'
        )
    for pattern, kind in table.items():
        where = "quantize" if pattern == ALL_LINEAR else f"quantize: {shown_value(pattern)}"
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: a pattern must be a string")
        if kind is None or (isinstance(kind, str) and kind in WRITABLE):
            continue
        what = "can be read from files, but not written" if kind in KINDS else "is not a kind"
        raise ConfigError(
            f"{where}: {shown_value(kind)} {what}; choose one of {', '.join(WRITABLE)}, or "
            f"{KEEP!r} for the codes in the file"
        )
    return dict(table)


def quantized_shapes(like: Any, naming: Naming, table: Mapping[str, str | None]) -> Any:
    """Return the shapes of a model's parameters, those to quantize as `QuantizedWeight`s of shapes.

    The blocks lie along the axis that a linear layer sums, and along the width of an embedding.

    Args:
      like: a tree of `ShapeDtypeStruct`s, with a `NamedSharding` each where they lie on a mesh.
      naming: of its leaves.
      table: from `parse_quantize`.

    Raises:
      ConfigError: blocks do not divide an axis or its shards: all such leaves are listed.
      TargetError: a pattern selects no weight of a layer.
    """
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
        try:
            named = _block_axis(places[path])
            axis = choose_axis(path, leaves[path], kind, None, None, named)
            leaves[path], _ = quantize_leaf(leaves[path], kind, axis)
        except ConfigError as error:
            left_out = f'{{"{path}": None, "{ALL_LINEAR}": "{kind}"}}'
            problems.append(str(error).replace("with exclude=", f"with quantize={left_out}"))
    if problems:
        raise ConfigError("quantize: " + grouped(problems))
    return jax.tree_util.tree_unflatten(treedef, leaves.values())


def _select(pattern: str, weights: Mapping[str, Place]) -> list[str]:
    """Return the weights that a pattern selects: all-linear, or a name or a regex.

    A name is the end of a path or a module above it, in the tree or as PyTorch calls it.

    Raises:
      TargetError: there is none.
      ConfigError: the pattern is not a regular expression.
    """
    if pattern == ALL_LINEAR:
        others = ("embedding", "conv")
        linear = [path for path, place in weights.items() if place.entry.kind not in others]
        return [path for path in linear if path not in _HEADS]
    found = [path for path in weights if names_module(pattern, path)]
    if not found:  # PyTorch's names, of which a stacked leaf has one a layer
        found = [p for p, place in weights.items() if _names_in_torch(pattern, place)]
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


def _names_in_torch(pattern: str, place: Place) -> bool:
    names = (name for _, names in place.layers() for name in names)
    in_path = lambda name: name.removesuffix(".weight").replace(".", "/")
    return any(names_module(in_path(pattern), in_path(name)) for name in names)


def _block_axis(place: Place) -> int:
    """Return the axis of the blocks, counted from the end."""
    layout = place.entry.layout
    summed = "o" if place.entry.kind == "embedding" else "i"  # a lookup returns whole rows
    return layout.rindex(summed) - len(layout)
