"""PyTorch's tensors of quantized leaves: fields of codes, with PyTorch's axes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized
from lora_jax.files.naming.codes import field_place
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.table import Naming
from lora_jax.files.naming.translation import shapes
from lora_jax.files.naming.writing import Part, TorchTensor


def to_torch_codes(naming: Naming, tree: Any) -> dict[str, QuantizedWeight]:
    """Return the quantized leaves of a tree by PyTorch's names; the other leaves are left out.

    The fields are `TorchTensor`s, whose values are made when they are asked for. What
    `translation.to_tree` makes of tensors with such `codes` is the tree again.

    Raises:
      StructureError: leaves match no row of the naming, or are joined from several tensors or parts
        of one; all are listed.
    """
    leaves, _ = flatten_with_paths(tree)
    codes = {path: leaf for path, leaf in leaves.items() if is_quantized(leaf)}
    places = naming.places({path: leaf.shape for path, leaf in codes.items()})
    problems = [f"{path}: no row of the naming has this path" for path in codes.keys() - places]
    problems += [
        f"{path}: cannot be written as codes, because it is not one tensor in PyTorch; "
        "dequantize it first"
        for path, place in places.items()
        if len(place.entry.torch_names) > 1 or len(place.entry.paths) > 1
    ]
    if problems:
        raise StructureError(grouped(sorted(problems)))
    return {
        name: _tensor(place, where, codes[path])
        for path, place in places.items()
        for where, (name,) in place.layers()
    }


def float_leaves(tree: Any) -> Mapping[str, Any]:
    """Return the leaves of a tree that are not quantized, by path."""
    leaves, _ = flatten_with_paths(tree)
    return {path: leaf for path, leaf in leaves.items() if not is_quantized(leaf)}


def _tensor(place: Place, where: tuple[int, ...], leaf: QuantizedWeight) -> QuantizedWeight:
    """Return one layer's codes."""
    fields = {}
    for name, field in leaf.fields.items():
        own = field_place(place, leaf, name).among({})
        part = Part(own, where, 0, field)
        fields[name] = TorchTensor(shapes(own)[0], np.dtype(field.dtype), (part,))
    left, right = place.entry.groups(len(place.shape))
    (letter,) = right[leaf.axis]
    axis = next(i for i, group in enumerate(left) if letter in group) - len(left)
    return QuantizedWeight(fields, leaf.kind, axis, leaf.dtype)
