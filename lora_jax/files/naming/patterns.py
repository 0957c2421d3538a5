"""The two small languages of a naming: einops patterns for axes, and placeholders in names."""

import functools
import re
from collections.abc import Mapping

from lora_jax.core.errors import ConfigError

#: The letters of each axis of an array.
Groups = tuple[tuple[str, ...], ...]


@functools.cache
def parse(pattern: str) -> tuple[Groups, Groups]:
    """Return the letters of each axis on both sides of an einops pattern.

    >>> parse("(h d) i -> i h d")
    ((('h', 'd'), ('i',)), (('i',), ('h',), ('d',)))

    Raises:
      ConfigError: it is not a pattern of letters and groups in brackets, or repeats a letter.
    """
    sides = pattern.split("->")
    if len(sides) != 2 or not all(_SIDE.fullmatch(side) for side in sides):
        raise ConfigError(f"axes: {pattern!r} is not a pattern like '(h d) i -> i h d'")
    both = tuple(
        tuple(tuple(found[0].strip("()").split()) for found in _AXIS.finditer(side))
        for side in sides
    )
    for side in both:
        letters = [x for group in side for x in group]
        if len(letters) != len(set(letters)):
            raise ConfigError(f"axes: {pattern!r} names an axis twice on one side")
    return both  # type: ignore[return-value]


_AXIS = re.compile(r"\([\w\s]*\)|\w+")
_SIDE = re.compile(rf"\s*(?:(?:{_AXIS.pattern})\s*)*")


def text(groups: Groups) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


_MARK = re.compile(r"\{(\*?)(\w+)\}")


def placeholders(name: str) -> set[str]:
    return {mark[2] for mark in _MARK.finditer(name)}


def fill(template: str, values: Mapping[str, str]) -> str:
    return _MARK.sub(lambda mark: values[mark[2]], template)


def match(template: str, path: str) -> dict[str, str] | None:
    """Return the placeholders' values where a path matches, or None if it does not.

    >>> match("h_{n}/{*m}/kernel", "h_2/mlp/up/kernel"), match("a/b", "a/c")
    ({'n': '2', 'm': 'mlp/up'}, None)
    """
    if "{" not in template:  # models of thousands of such rows are in no need of regexes
        return {} if template == path else None
    found = _path_regex(template).fullmatch(path)
    return None if found is None else found.groupdict()


@functools.cache
def _path_regex(template: str) -> re.Pattern[str]:
    """Return a regex with one group per placeholder of a path."""
    parts, end = [], 0
    for mark in _MARK.finditer(template):
        inner = "[^/]+(?:/[^/]+)*" if mark[1] else "[^/]+"
        parts.append(re.escape(template[end : mark.start()]) + f"(?P<{mark[2]}>{inner})")
        end = mark.end()
    return re.compile("".join(parts) + re.escape(template[end:]))
