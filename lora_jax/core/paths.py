"""Key paths as strings: "block_0/attn/query/kernel"."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.boxes import children, holds_one, is_box
from lora_jax.core.errors import StructureError
from lora_jax.core.quantized.weight import is_quantized

KeyPath = tuple[Any, ...]


def path_str(key_path: tuple) -> str:
    """Return a JAX key path as a string.

    >>> path_str((jax.tree_util.GetAttrKey("attn"), jax.tree_util.DictKey("kernel")))
    'attn/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten_with_key_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[KeyPath, Any]]:
    """Return the leaves of `tree` with their key paths, as JAX does, but without Flax's boxes.

    Flax keeps each array of a model or an `nnx.State` in an `nnx.Variable`, and each partitioned
    array in a box, as their attribute `value`. The path of such a leaf is that of the variable or
    box. A field `value` of any other class is a name like all others. A quantized weight is one
    leaf.
    """
    stop = _or_quantized(is_leaf)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, lambda x: stop(x) or is_box(x))
    if not any(is_box(node) for _, node in flat):
        return flat
    found: list[tuple[KeyPath, Any]] = []
    for path, node in flat:
        found += _inside(path, node, is_leaf) if is_box(node) else [(path, node)]
    return found


def _or_quantized(is_leaf: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    return lambda x: is_quantized(x) or (is_leaf is not None and is_leaf(x))


def _inside(path: KeyPath, box: Any, is_leaf: Any) -> list[tuple[KeyPath, Any]]:
    """Return the leaves in a box; if its value is itself a tree, the name `value` stays."""
    return [
        ((*path, *(() if holds_one(box) and not rest else key), *rest), leaf)
        for key, child in children(box)
        for rest, leaf in flatten_with_key_paths(child, is_leaf)
    ]


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Return a separate key per path, so that another target does not change the others' values.

    It is folded from the SHA-256 of the path, which is the same in every process.
    """
    return jax.random.fold_in(
        key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    )


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Any]:
    """Return the leaves of `tree` by path, in tree order, and the structure of the tree.

    A quantized weight is one leaf.

    Raises:
      StructureError: two leaves have the same path, as in {"a/b": 1, "a": {"b": 2}}.
    """
    flat = flatten_with_key_paths(tree, is_leaf)
    treedef = jax.tree.structure(tree, is_leaf=_or_quantized(is_leaf))
    leaves = {path_str(path): leaf for path, leaf in flat}
    if len(leaves) < len(flat):
        counts = Counter(path_str(path) for path, _ in flat)
        twice = [path for path, count in counts.items() if count > 1]
        raise StructureError(f"several leaves have the same path: {', '.join(twice)}. Rename a key")
    return leaves, treedef


def layer_number(path: str, pattern: str | None = None) -> tuple[str, int] | None:
    """Return the stack of layers that a leaf belongs to and its number there, or None.

    The number is at the end of a segment (between slashes or dots): of the first that has one, or
    with a pattern of the one with that name. The pattern may also be a regex, whose group matches
    the number.

    >>> layer_number("decoder/block_3/Dense_0/kernel")
    ('decoder/block_', 3)
    >>> layer_number("decoder/block_3/Dense_0/kernel", "Dense")
    ('decoder/block_3/Dense_', 0)
    >>> layer_number("model.layers.3.q_proj.weight", "layers")
    ('model.layers.', 3)
    """
    regex = re.compile(pattern) if pattern is not None else None
    if regex is not None and regex.groups:
        found = regex.search(path)
        is_number = found is not None and (found[1] or "").isdigit()
        return (path[: found.start(1)], int(found[1])) if found and is_number else None
    before = ""  # the name in front of a segment that is only a number
    for segment in re.finditer(r"[^/.]+", path):
        numbered = re.fullmatch(r"(.*?)[_-]?(\d+)", segment[0])
        if numbered:
            name = numbered[1] or before
            if pattern is None or name == pattern:
                return path[: segment.start() + numbered.start(2)], int(numbered[2])
        before = segment[0]
    return None
