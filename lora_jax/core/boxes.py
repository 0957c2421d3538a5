"""Boxes of Flax: objects that hold one array as their attribute `value`."""

from collections.abc import Callable
from typing import Any

import jax

#: The classes that hold an array: of NNX, of older NNX states, and of Linen.
_VARIABLES, _BOXES = ("Variable", "VariableState"), ("AxisMetadata",)


def is_box(node: Any) -> bool:
    """Return whether a node is a variable or a box of Flax, which need not be imported for it."""
    return _has_class(node, _VARIABLES + _BOXES)


def is_variable(node: Any) -> bool:
    """Return whether a node is a variable of Flax NNX."""
    return _has_class(node, _VARIABLES)


def _has_class(node: Any, names: tuple[str, ...]) -> bool:
    return any(
        cls.__name__ in names and cls.__module__.startswith("flax.") for cls in type(node).__mro__
    )


def children(box: Any) -> list[tuple[Any, Any]]:
    """Return what is one level below a node, each with its key path."""
    return jax.tree_util.tree_flatten_with_path(box, lambda x: x is not box)[0]


def holds_one(box: Any) -> bool:
    """Return whether a box holds a `value` and nothing else that is a leaf or a tree."""
    return [key for key, _ in children(box)] == [(jax.tree_util.GetAttrKey("value"),)]


def opened(node: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the value in a box and what puts another value into such a box.

    Anything else is its own value, and another value takes its place.
    """
    if not is_box(node) or not holds_one(node):
        return node, lambda value: value
    (value,), treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    return value, lambda value: jax.tree.unflatten(treedef, [value])


def axis_names(box: Any) -> tuple[Any, ...] | None:
    """Return the mesh axis or logical name of each axis of the value in a box, or None."""
    if is_variable(box):
        found = box.get_metadata().get("out_sharding")
    else:
        found = getattr(box, "names", None) if is_box(box) else None
    return tuple(found) if isinstance(found, tuple) else None


def with_axis_names(box: Any, value: Any, names: tuple[Any, ...]) -> Any:
    """Return a box of the same class with another value, whose axes have these names."""
    if not is_variable(box):
        return box.replace(value=value, names=names)
    _, put = opened(box)
    new = put(value)
    new.set_metadata(out_sharding=names)
    return new
