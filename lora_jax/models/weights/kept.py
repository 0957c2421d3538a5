"""`models.load(quantize="keep")`: each parameter as the file has it, quantized ones as codes."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files.naming import Naming, Place, codes_of, leaf_like


def kept_shapes(naming: Naming, tensors: Mapping[str, Any], like: Any) -> Any:
    """Return the shapes of a model's parameters, kept as they are in the file.

    Args:
      naming: which tensor is which leaf.
      tensors: by name; those that are stored as codes have a method `codes`.
      like: a tree of the parameters' shapes, with the dtype that quantized ones stand for.

    Returns:
      The tree with a `QuantizedWeight` for each leaf whose tensors are stored as codes. The other
      leaves have the dtype in the file.

    Raises:
      ConfigError: the layers of a stacked leaf are quantized in several ways.
      StructureError: the blocks of a tensor are not blocks along one axis of its leaf.
    """
    leaves, treedef = flatten_with_paths(like)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    kept = [
        _kept_leaf(places[path], tensors, leaf) if path in places else leaf
        for path, leaf in leaves.items()
    ]
    return jax.tree_util.tree_unflatten(treedef, kept)


def _kept_leaf(place: Place, tensors: Mapping[str, Any], like: Any) -> Any:
    layers = [[tensors[name] for name in names if name in tensors] for _, names in place.layers()]
    found = [tensor for layer in layers for tensor in layer]
    formats = [_format(tensor) for tensor in found]
    codes = codes_of(found[0]) if found else None
    if any(codes_of(tensor) is not None for tensor in found) and len(set(formats)) > 1:
        alike = len({kind for kind, _ in formats}) == 1
        told = Counter(f"{kind} in blocks of {n}" if alike else kind for kind, n in formats)
        counts = ", ".join(f"{n} {kind}" for kind, n in told.most_common())
        raise ConfigError(
            f"{place.path}: quantize='keep' cannot stack tensors of several kinds: {counts}. "
            "Load the model with scan=False"
        )
    if codes is not None:
        return leaf_like(place, codes, like)
    dtypes = [getattr(tensor, "stored_dtype", tensor.dtype) for tensor in found]
    dtype = jnp.result_type(*dtypes) if dtypes else like.dtype
    dtype = np.dtype("float32") if dtype == np.dtype("float64") else dtype
    return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)


def _format(tensor: Any) -> tuple[str, int]:
    """Return the kind of a tensor, or its dtype, and the numbers per block."""
    codes = codes_of(tensor)
    if codes is None:
        return str(getattr(tensor, "kind", tensor.dtype)), 1
    return codes.kind, codes.block


def warn_of_floats(path: Any, tensors: Iterable[Any]) -> None:
    """Warn of quantized tensors that become floats, because a kind for their type is missing."""
    lost = [x for x in tensors if getattr(x, "is_quantized", False) and codes_of(x) is None]
    if lost:
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(x.kind for x in lost).items())
        size = lambda n: f"{n / 1e6:,.1f} MB"
        before = sum(x.stored.nbytes for x in lost)
        after = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in lost)
        warnings.warn(
            f"{path}: quantize='keep' reads {len(lost)} tensors as floats, because their types "
            f"cannot be kept as codes ({counts}; first {lost[0].name}): {size(before)} in the "
            f"file, {size(after)} in memory",
            stacklevel=4,
        )
