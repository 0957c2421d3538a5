"""Convert whole weights between PyTorch's files and a tree, by a naming."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.table import Naming


def to_tree(
    naming: Naming, tensors: Mapping[str, Any], like: Any, *, ignore: Iterable[str] = ()
) -> Any:
    """Return a tree of the values in `tensors`, which have PyTorch's names and axes.

    Args:
      naming: which tensor is which leaf.
      tensors: arrays by name, read one at a time, so the mapping may load them from a file.
      like: a tree of arrays or `ShapeDtypeStruct`s: the structure, shapes and dtypes of the result.
      ignore: regexes that match the whole names of tensors to ignore.

    Raises:
      StructureError: tensors are missing, unexpected, or of another shape or kind of dtype, or a
        leaf matches no row of the naming; all are listed.

    >>> import numpy as np
    >>> from lora_jax.files.naming import Entry
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> like = {"up": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    >>> to_tree(naming, {"up.weight": np.ones((3, 2), "float32")}, like)["up"]["kernel"].shape
    (2, 3)
    """
    leaves, treedef = flatten_with_paths(like)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    problems = [f"{path}: no row of the naming has this path" for path in leaves.keys() - places]
    wanted: set[str] = set()
    values: dict[str, Any] = {}
    for path, place in places.items():
        values[path], found = _gather(place, tensors, leaves[path].dtype)
        wanted |= {name for _, names in place.layers() for name in names}
        problems += found
    ignored = [re.compile(pattern) for pattern in ignore]
    problems += [
        f"{name}: unexpected"
        for name in tensors
        if name not in wanted and not any(regex.fullmatch(name) for regex in ignored)
    ]
    if problems:
        raise StructureError(grouped(sorted(set(problems)), "tensors"))
    return jax.tree_util.tree_unflatten(treedef, [values[path] for path in leaves])


def _gather(place: Place, tensors: Mapping[str, Any], dtype: Any) -> tuple[Any, list[str]]:
    """Return one leaf, and what is wrong with its tensors."""
    value, problems = None, []
    for where, names in place.layers():
        parts: list[np.ndarray] = []
        for name, shape in zip(names, shapes(place), strict=True):
            problem = _problem(place, name, shape, tensors, dtype)
            problems += [problem] if problem else []
            parts += [] if problem else [np.asarray(tensors[name])]
        if not problems:
            # only after the first tensor fits: an untrusted file may demand any size
            value = np.empty(place.shape, dtype) if value is None else value
            joined = np.concatenate(parts, place.entry.out_axis) if len(parts) > 1 else parts[0]
            layer = place.weight_to_tree(_part(place, joined))
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                value[place.at(where)] = layer
            if _overflows(layer, value[place.at(where)]):
                problems.append(
                    f"{', '.join(names)}: has values that overflow {value.dtype}; choose a dtype "
                    "of a wider range"
                )
    return (jnp.asarray(value) if not problems else None), problems


def _overflows(x: np.ndarray, cast: np.ndarray) -> bool:
    """Return whether finite values of `x` are not finite in the dtype that they were cast to."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    if jnp.finfo(x.dtype).max <= jnp.finfo(cast.dtype).max:
        return False
    return not np.isfinite(cast).all() and bool(np.isfinite(x).sum() > np.isfinite(cast).sum())


def shapes(place: Place) -> list[tuple[int, ...]]:
    """Return the PyTorch shapes of one layer's tensors: several are joined, or one is shared."""
    shape, axis = place.torch_shape, place.entry.out_axis
    if not shape:
        return [()]
    widths = (place.total,) if len(place.entry.torch_names) == 1 else place.widths
    return [(*shape[:axis], width, *shape[axis + 1 :]) for width in widths]


def _part(place: Place, joined: np.ndarray) -> np.ndarray:
    """Return the leaf's part of a tensor that it shares, or the whole tensor."""
    if len(place.entry.paths) == 1:
        return joined
    return joined[(slice(None),) * place.entry.out_axis + (slice(place.start, place.stop),)]


def _problem(
    place: Place, name: str, shape: tuple[int, ...], tensors: Mapping[str, Any], dtype: Any
) -> str | None:
    if name not in tensors:
        return f"{name}: missing, {shape} for {place.path}"
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        return f"{name}: has shape {tuple(tensor.shape)}, but {place.path} needs {shape}"
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
        return f"{name}: is {tensor.dtype}, but {place.path} is {jnp.dtype(dtype)}"
    return None


def to_torch(naming: Naming, tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree as tensors with PyTorch's names and axes; inverse of `to_tree`.

    Raises:
      StructureError: leaves match no row of the naming, or a leaf that shares a tensor with others
        is there without them; all are listed.

    >>> import numpy as np
    >>> from lora_jax.files.naming import Entry
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> to_torch(naming, {"up": {"kernel": np.ones((2, 3))}})["up.weight"].shape
    (3, 2)
    """
    leaves, _ = flatten_with_paths(tree)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    problems = [f"{path}: no row of the naming has this path" for path in leaves.keys() - places]
    problems += [
        f"{path}: shares {place.entry.torch} with {other}, which is not in the tree"
        for path, place in places.items()
        for other in place.shared_with
        if other not in places
    ]
    if problems:
        raise StructureError(grouped(sorted(problems)))
    tensors: dict[str, np.ndarray] = {}
    for path, place in places.items():
        leaf, axis = np.asarray(leaves[path]), place.entry.out_axis
        for where, names in place.layers():
            weight = place.weight_to_torch(leaf[place.at(where)])
            if len(place.entry.paths) > 1:
                (shape,) = shapes(place)
                shared = tensors.setdefault(names[0], np.empty(shape, leaf.dtype))
                _part(place, shared)[...] = weight
            elif len(names) > 1:
                ends = np.cumsum(place.widths)[:-1]
                tensors.update(zip(names, np.split(weight, ends, axis), strict=True))
            else:
                tensors[names[0]] = weight
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def index(places: Mapping[str, Place]) -> dict[str, list[tuple[Place, tuple[int, ...], int]]]:
    """Return the leaves in each tensor: the place, the layer, and the number of the joined tensor.

    >>> from lora_jax.files.naming import Entry
    >>> rows = Naming((Entry("h.{n}.w", "h/w", "linear", "o i -> n i o"),))
    >>> [(name, where) for name, [(_, where, _)] in index(rows.places({"h/w": (2, 3, 4)})).items()]
    [('h.0.w', (0,)), ('h.1.w', (1,))]
    """
    found: dict[str, list[tuple[Place, tuple[int, ...], int]]] = {}
    for place in places.values():
        for where, names in place.layers():
            for i, name in enumerate(names):
                found.setdefault(name, []).append((place, where, i))
    return found
