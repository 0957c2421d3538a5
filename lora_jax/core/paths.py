"""Key paths as strings ("block_0/attn/query/kernel"), and the patterns that select them."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core.errors import ConfigError, StructureError, TargetError

#: A regex that must match the whole path, path suffixes in whole segments, or a predicate.
Pattern = str | Sequence[str] | Callable[[str, Any], bool]


def path_str(key_path: tuple) -> str:
    """`"block_0/attn/query/kernel"` for a JAX key path.

    Flax keeps each array of an `nnx.State`, and each boxed one, as the attribute `value` of an
    object; such a leaf has the object's path.

    >>> path_str((jax.tree_util.DictKey("kernel"), jax.tree_util.GetAttrKey("value")))
    'kernel'
    """
    if len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, so that one more target changes no other's start.

    Folded from the path's SHA-256, which is the same in every process.
    """
    return jax.random.fold_in(
        key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    )


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Any]:
    """The leaves of `tree` by path, in tree order, and the tree's structure.

    Raises:
      StructureError: two leaves have the same path, as {"a/b": 1, "a": {"b": 2}} has.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = {path_str(path): leaf for path, leaf in flat}
    if len(leaves) < len(flat):
        counts = Counter(path_str(path) for path, _ in flat)
        twice = [path for path, count in counts.items() if count > 1]
        raise StructureError(f"several leaves have the same path: {', '.join(twice)}; rename a key")
    return leaves, treedef


def names_leaf(entry: str, path: str) -> bool:
    """Whether `entry` is `path` or its last whole segments."""
    return path == entry or path.endswith("/" + entry)


def names_module(entry: str, path: str) -> bool:
    """Whether `entry` names a module above the leaf at `path`: "query" in "attn/query/kernel"."""
    return names_leaf(entry, path) or ("/" + entry + "/") in ("/" + path)


def nearest(entry: str, paths: Iterable[str]) -> str:
    """The paths most like `entry`, as the end of an error message."""
    plain = re.sub(r"[\\^$.*+?()|\[\]]+", "", entry)

    def likeness(path: str) -> float:
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        return max(difflib.SequenceMatcher(None, plain, tail).ratio() for tail in (*tails, *parts))

    found = sorted(paths, key=likeness, reverse=True)[:3]
    return (
        "nearest paths: " + ", ".join(found) if found else "the tree has no leaves to choose from"
    )


def compile_regex(field: str, pattern: str) -> re.Pattern[str]:
    """`pattern` compiled, or an error that names the configuration field it came from."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def select(field: str, pattern: Pattern, leaves: Mapping[str, Any]) -> dict[str, str]:
    """The paths in `leaves` that `pattern` selects, each with the entry that selected it.

    A string is a regex for the whole path. A sequence holds path suffixes in whole segments; an
    entry that ends no path may name a module, and stands for the leaves under it. A callable is
    called with the path and the leaf.

    Raises:
      TargetError: an entry selects nothing (each such entry is named with the nearest paths).
    """
    if callable(pattern):
        chosen = {path: "<callable>" for path, leaf in leaves.items() if pattern(path, leaf)}
        if not chosen:
            raise TargetError(f"{field}: the callable selected none of {len(leaves)} leaves")
        return chosen
    if isinstance(pattern, str):
        regex = compile_regex(field, pattern)
        chosen = {path: pattern for path in leaves if regex.fullmatch(path)}
        unmatched = [] if chosen else [pattern]
    else:
        chosen, unmatched = {}, []
        for entry in pattern:
            found = [p for p in leaves if names_leaf(entry, p)]
            found = found or [p for p in leaves if names_module(entry, p)]
            chosen.update({path: entry for path in found if path not in chosen})
            if not found:
                unmatched.append(entry)
    if unmatched:
        lines = [
            f"{field}: {entry!r} matches no path; {nearest(entry, leaves)}" for entry in unmatched
        ]
        raise TargetError("\n".join(lines))
    return chosen


def lookup(table: Mapping[str, Any], path: str) -> tuple[str, Any] | None:
    """The (key, value) of the first key in `table` that matches `path`.

    A key matches as a path suffix, a module above the leaf, or a regex for the whole path. The path
    itself wins, then that of the module it is in.
    """
    for exact in (path, path.rpartition("/")[0]):
        if exact in table:
            return exact, table[exact]
    for key, value in table.items():
        if names_module(key, path) or compile_regex("overrides", key).fullmatch(path):
            return key, value
    return None


def layer_number(path: str, pattern: str | None = None) -> tuple[str, int] | None:
    """The stack of layers that a leaf belongs to, and its number in it; None where it has none.

    The number is the first segment (between slashes or dots) that ends in one; with a pattern that
    of the segment named so, or what the regex's group finds.

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
    before = ""  # the name in front of a segment that is a number and nothing else
    for segment in re.finditer(r"[^/.]+", path):
        numbered = re.fullmatch(r"(.*?)[_-]?(\d+)", segment[0])
        if numbered:
            name = numbered[1] or before
            if pattern is None or name == pattern:
                return path[: segment.start() + numbered.start(2)], int(numbered[2])
        before = segment[0]
    return None
