"""Convert whole weights between PyTorch's files and a tree, by a naming."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.naming.codes import codes_of, has_codes, is_stored_as, read_codes
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.quantizing import read_quantized
from lora_jax.files.naming.reading import StoredLeaf, read
from lora_jax.files.naming.table import Naming
from lora_jax.files.naming.writing import Part, TorchTensor


def to_tree(
    naming: Naming, tensors: Mapping[str, Any], like: Any, *, ignore: Iterable[str] = ()
) -> Any:
    """Return a tree of the values in `tensors`, which have PyTorch's names and axes.

    Args:
      naming: which tensor is which leaf.
      tensors: arrays by name, read one at a time, so the mapping may load them from a file.
      like: a tree of arrays or `ShapeDtypeStruct`s: the structure, shapes and dtypes of the result.
        A leaf with a `NamedSharding` is read into its shards: a process reads only its own. A
        leaf that is a `QuantizedWeight` of shapes is read as codes: those of its tensors, if they
        are stored as such (see `naming.codes`), are moved as the numbers would be; others are
        quantized while they are read.
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
    values: dict[str, Any] = {}
    problems: list[str] = []
    for path, place in _checked_places(naming, tensors, leaves, ignore).items():
        make: Any = read_quantized if is_quantized(leaves[path]) else read
        if has_codes(place, tensors, leaves[path]):
            make = read_codes
        values[path], over = make(place, tensors, leaves[path])
        problems += [
            f"{', '.join(names)}: has values that overflow {values[path].dtype}; choose a dtype "
            "of a wider range"
            for names in over
        ]
    _refuse(problems)
    return jax.tree_util.tree_unflatten(treedef, [values[path] for path in leaves])


def to_stored_tree(
    naming: Naming, tensors: Mapping[str, Any], like: Any, *, ignore: Iterable[str] = ()
) -> Any:
    """Return the tree that `to_tree` returns, of `StoredLeaf`s that are read when asked for.

    Raises:
      StructureError: as in `to_tree`, but not for values that overflow.
    """
    leaves, treedef = flatten_with_paths(like)
    places = _checked_places(naming, tensors, leaves, ignore)
    stored = [StoredLeaf(places[path], tensors, leaf.dtype) for path, leaf in leaves.items()]
    return jax.tree_util.tree_unflatten(treedef, stored)


def _checked_places(
    naming: Naming, tensors: Mapping[str, Any], leaves: Mapping[str, Any], ignore: Iterable[str]
) -> dict[str, Place]:
    """Return the place of each leaf, before anything is allocated: a file may demand any size."""
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    problems = [f"{path}: no row of the naming has this path" for path in leaves.keys() - places]
    wanted: set[str] = set()
    for path, place in places.items():
        wanted |= {name for _, names in place.layers() for name in names}
        problems += _problems(place, tensors, leaves[path])
    ignored = [re.compile(pattern) for pattern in ignore]
    problems += [
        f"{name}: unexpected"
        for name in tensors
        if name not in wanted and not any(regex.fullmatch(name) for regex in ignored)
    ]
    _refuse(problems)
    return places


def _refuse(problems: Iterable[str]) -> None:
    if problems:
        raise StructureError(grouped(sorted(set(problems)), "tensors"))


def _problems(place: Place, tensors: Mapping[str, Any], like: Any) -> list[str]:
    """List what is wrong with a leaf's tensors."""
    found = [
        _problem(place, name, shape, tensors, like)
        for _, names in place.layers()
        for name, shape in zip(names, shapes(place), strict=True)
    ]
    return [problem for problem in found if problem]


def shapes(place: Place) -> list[tuple[int, ...]]:
    """Return the PyTorch shapes of one layer's tensors: several are joined, or one is shared."""
    shape, axis = place.torch_shape, place.entry.out_axis
    if not shape:
        return [()]
    widths = (place.total,) if len(place.entry.torch_names) == 1 else place.widths
    return [(*shape[:axis], width, *shape[axis + 1 :]) for width in widths]


def _problem(
    place: Place, name: str, shape: tuple[int, ...], tensors: Mapping[str, Any], like: Any
) -> str | None:
    if name not in tensors:
        return f"{name}: missing, {shape} for {place.path}"
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        return f"{name}: has shape {tuple(tensor.shape)}, but {place.path} needs {shape}"
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(like.dtype, jnp.floating):
        return f"{name}: is {tensor.dtype}, but {place.path} is {jnp.dtype(like.dtype)}"
    if is_quantized(like) and like.format.encode is None and not is_stored_as(place, tensor, like):
        codes = codes_of(tensor)
        kind = codes.kind if codes is not None else "not stored as codes"
        return f"{name}: is {kind}, but {place.path} is {like.kind}"
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
    tensors = to_torch_tensors(naming, tree)
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def to_torch_tensors(naming: Naming, tree: Any) -> dict[str, TorchTensor]:
    """Return what `to_torch` returns, as tensors whose values are made when asked for.

    The leaves may be `StoredLeaf`s too, or others with a shape, a dtype and `layer`.

    Raises:
      StructureError: as in `to_torch`.
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
    return {
        name: TorchTensor(
            shapes(parts[0][0])[parts[0][2]],
            np.dtype(leaves[parts[0][0].path].dtype),
            tuple(Part(place, where, i, leaves[place.path]) for place, where, i in parts),
        )
        for name, parts in index(places).items()
    }


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
