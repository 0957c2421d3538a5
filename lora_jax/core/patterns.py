"""Patterns that select key paths, and suggestions for one that matches nothing."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.errors import ConfigError, TargetError, warn_user
from lora_jax.core.foreign import shown

#: A regex that must match the whole path, path suffixes in whole segments, or a predicate.
Pattern = str | Sequence[str] | Callable[[str, Any], bool]


def names_leaf(entry: str, path: str) -> bool:
    """Return whether `entry` is `path` or its last whole segments."""
    return path == entry or path.endswith("/" + entry)


def names_module(entry: str, path: str) -> bool:
    """Return whether `entry` names a module above a leaf: "query" in "attn/query/kernel"."""
    return names_leaf(entry, path) or ("/" + entry + "/") in ("/" + path)


def nearest(entry: str, paths: Iterable[str]) -> str:
    """Return the paths that are most like `entry`, for the end of an error message."""
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
    """Compile `pattern`, or raise an error that names its configuration field."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def select(field: str, pattern: Pattern, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths in `leaves` that `pattern` selects, each with the entry that selected it.

    A string is a regex for the whole path. A sequence contains path suffixes of whole segments; an
    entry at which no path ends may name a module, and selects the leaves under it. A callable is
    called with the path and the leaf. A `UserWarning` says where an entry ends a path and names
    modules too, which it then does not select.

    Raises:
      TargetError: an entry selects nothing; each such entry is listed with the nearest paths.
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
            inside = [p for p in leaves if names_module(entry, p) and p not in found]
            if found and inside:
                _tell_leaf_won(field, entry, found[0], inside[0])
            found = found or inside
            chosen.update({path: entry for path in found if path not in chosen})
            if not found:
                unmatched.append(entry)
    if unmatched:
        lines = [
            f"{field}: {entry!r} matches no path; {nearest(entry, leaves)}" for entry in unmatched
        ]
        if isinstance(pattern, str) and any(names_module(pattern, path) for path in leaves):
            lines.append(
                f"A string is a regex for the whole path, and a list holds names of modules and "
                f"ends of paths: write {field}=[{pattern!r}]"
            )
        raise TargetError("\n".join(lines))
    return chosen


def _tell_leaf_won(field: str, entry: str, leaf: str, inside: str) -> None:
    module, _, rest = f"/{inside}".partition(f"/{entry}/")
    warn_user(
        f"{field}: {entry!r} selects the leaf {shown(leaf)}, which wins over the module "
        f"{shown(f'{module}/{entry}'.strip('/'))}; for that, name a leaf in it: {entry}/{rest}"
    )


def lookup(table: Mapping[str, Any], path: str, field: str = "overrides") -> tuple[str, Any] | None:
    """Return (key, value) for the first key in `table` that matches `path`, or None.

    A key matches as a path suffix, as a module above the leaf, or as a regex for the whole path.
    The path itself wins, then that of its module. `field` names the table in errors.
    """
    for exact in (path, path.rpartition("/")[0]):
        if exact in table:
            return exact, table[exact]
    for key, value in table.items():
        if names_module(key, path) or compile_regex(field, key).fullmatch(path):
            return key, value
    return None
