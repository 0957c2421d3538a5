"""Regular expressions of a configuration, which comes from strangers, matched in bounded time.

On `(a+)+$` Python's `re` tries every way to divide a name, and never ends. Here a pattern goes
through a name once, at all positions where it can be at a time: they are the bits of an integer.
So the time grows with the pattern and the name, and what is left (repeats within repeats) is
counted. Whether there is a match is all that is asked, and is the same as with `re`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from lora_jax.errors import ConfigError

_STEPS, _LENGTH, _DEPTH = 20_000, 20_000, 50
_LOOKBEHIND = r"\(\?<[=!](?:\\.|[^()\\*+?{\[])*\)"
_TOKEN = re.compile(
    rf"""(?P<one>\\(?:x..|u.{{4}}|U.{{8}}|0[0-7]{{0,2}}|[^0-9xuUNAZbB])
         |\[\^?\]?(?:\\.|[^\]\\])*\])
    |(?P<zero>\\[AZbB]|[$^]|{_LOOKBEHIND})
    |(?P<comment>\(\?\#[^)]*\))
    |(?P<open>\((?:\?(?::|=|!|P<\w+>))?(?!\?))
    |(?P<repeat>(?:[*+?]|\{{(?!\}})(?P<least>\d*)(?P<comma>,(?P<most>\d*))?\}})(?P<how>[?+]?))
    |(?P<close>\))|(?P<or>\|)
    |(?P<literal>[^\\(\[])""",
    re.VERBOSE | re.DOTALL,
)


class _Walk:
    """One name being matched: where each character is, and how many steps were taken."""

    def __init__(self, pattern: str, text: str):
        self.pattern, self.text, self.steps = pattern, text, 0
        self.where: dict[str, int] = {}
        for i, letter in enumerate(text):
            self.where[letter] = self.where.get(letter, 0) | 1 << i

    def step(self) -> None:
        self.steps += 1 + len(self.text) // 1000
        if self.steps > _STEPS:
            raise ConfigError(
                f"the regular expression {_shown(self.pattern)} takes too long to match "
                f"{_shown(self.text)}: write it with fewer repeats"
            )

    def positions(self, at: int) -> Iterator[int]:
        while at:
            self.step()
            yield (at & -at).bit_length() - 1
            at &= at - 1


#: From the positions where a part begins to those where it can end; both are bits.
_Part = Callable[[_Walk, int], int]


def _one(regex: re.Pattern[str]) -> _Part:
    def run(walk: _Walk, at: int) -> int:
        walk.step()
        there = 0
        for letter, where in walk.where.items():
            if where & at and regex.fullmatch(letter):
                there |= where
        return (at & there) << 1

    return run


def _zero(regex: re.Pattern[str]) -> _Part:
    return lambda walk, at: sum(1 << i for i in walk.positions(at) if regex.match(walk.text, i))


def _look(part: _Part, wanted: bool) -> _Part:
    return lambda walk, at: sum(
        1 << i for i in walk.positions(at) if bool(part(walk, 1 << i)) == wanted
    )


def _chain(parts: list[_Part]) -> _Part:
    def run(walk: _Walk, at: int) -> int:
        for part in parts:
            if not at:
                break
            at = part(walk, at)
        return at

    return run


def _choice(branches: list[_Part]) -> _Part:
    if len(branches) == 1:
        return branches[0]
    return lambda walk, at: functools.reduce(lambda found, x: found | x(walk, at), branches, 0)


def _repeat(part: _Part, least: int, most: int | None) -> _Part:
    def run(walk: _Walk, at: int) -> int:
        # of more steps than there are positions one stood still, and could have done so longer
        enough = len(walk.text) + 1
        for _ in range(min(least, enough)):
            walk.step()
            at = part(walk, at)
        found = new = at
        for _ in range(enough if most is None else min(most - least, enough)):
            if not new:
                break
            walk.step()
            new = part(walk, new) & ~found
            found |= new
        return found

    return run


@dataclasses.dataclass
class _Parser:
    """A pattern that `re` takes, read from left to right."""

    pattern: str
    flags: int
    at: int = 0
    depth: int = 0

    def choice(self) -> _Part:
        branches: list[list[_Part]] = [[]]
        while self.at < len(self.pattern):
            found = _TOKEN.match(self.pattern, self.at)
            if found is None:
                raise ConfigError(f"{_shown(self.pattern[self.at : self.at + 8])} is not read here")
            if found["close"]:
                break
            self.at = found.end()
            if found["or"]:
                branches.append([])
            elif found["repeat"]:
                branches[-1].append(self._repeated(branches[-1].pop(), found))
            elif not found["comment"]:
                branches[-1].append(self._atom(found))
        return _choice([_chain(branch) for branch in branches])

    def _atom(self, found: re.Match[str]) -> _Part:
        if found["open"]:
            self.depth += 1
            if self.depth > _DEPTH:
                raise ConfigError("is nested too deep")
            inner = self.choice()
            self.at += 1  # the bracket
            self.depth -= 1
            kind = found["open"]
            return _look(inner, kind == "(?=") if kind in ("(?=", "(?!") else inner
        regex = re.compile(found[0], self.flags)
        return _zero(regex) if found["zero"] else _one(regex)

    def _repeated(self, part: _Part, found: re.Match[str]) -> _Part:
        if found["how"] == "+":
            raise ConfigError(f"{_shown(found[0])} is not read here")
        sign = found["repeat"][0]
        if sign != "{":
            return _repeat(part, int(sign == "+"), 1 if sign == "?" else None)
        least = int(found["least"] or 0)
        if not found["comma"]:
            return _repeat(part, least, least)
        return _repeat(part, least, int(found["most"]) if found["most"] else None)


@functools.lru_cache(1024)
def _parsed(pattern: str) -> _Part:
    flags = re.compile(pattern).flags
    start = re.match(r"\(\?[aimsux]+\)", pattern)
    if flags & re.VERBOSE:
        raise ConfigError("(?x) is not read here")
    if len(pattern) > _LENGTH:
        raise ConfigError(f"has {len(pattern):,} characters, and {_LENGTH:,} are read")
    parser = _Parser(pattern, flags, start.end() if start else 0)
    return parser.choice()


def check(pattern: str) -> None:
    """Refuse a string that is no regular expression, or is one that is not read here.

    Not read are references back to groups, conditions, possessive repeats, repeats in a look behind
    and flags for a part.

    Raises:
      ConfigError: why it is refused, to go behind the pattern and a colon.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"is not a regular expression ({error})") from None
    if not is_plain(pattern):
        _parsed(pattern)


def is_plain(pattern: str) -> bool:
    """Whether there is neither a repeat nor a group, so that `re` is quick whatever the name."""
    return not re.search(r"[*+?{(]", pattern)


def match(pattern: str, text: str) -> bool:
    r"""Whether a pattern that `check` takes matches at the beginning, as `re.match` does.

    Raises:
      ConfigError: it would take too long.

    >>> match(r"(.*\.)?(q|v)$", "layers.0.v"), match(r"(a+)+$", "a" * 99 + "b")
    (True, False)
    """
    return bool(_parsed(pattern)(_Walk(pattern, text), 1))


def fullmatch(pattern: str, text: str) -> bool:
    r"""Whether a pattern that `check` takes matches the whole text, as `re.fullmatch` does.

    Raises:
      ConfigError: it would take too long.

    >>> fullmatch(r"^(?!.*visual).*(q_proj|k_proj)$", "visual.q_proj")
    False
    """
    if is_plain(pattern):
        return re.fullmatch(pattern, text) is not None
    return bool(_parsed(pattern)(_Walk(pattern, text), 1) >> len(text))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
