"""Patterns that select key paths, and suggestions where one matches nothing."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.errors import ConfigError, TargetError

#: A regex that must match the whole path, path suffixes in whole segments, or a predicate.
Pattern = str | Sequence[str] | Callable[[str, Any], bool]


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
