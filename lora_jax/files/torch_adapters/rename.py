"""Parts of tensor names that a file has and the base has not, such as a prefix of all names."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown

#: A part of a name and what takes its place, both without outer dots; "" is nothing.
Rule = tuple[str, str]

_MOST = 4  # rules that one file may need


def rename(name: str, rules: Mapping[str, str]) -> str:
    """Return a name with the first occurrence of each rule's part replaced; of "", the beginning.

    >>> rename("model.language_model.layers.0.q", {"model.language_model": "model"})
    'model.layers.0.q'
    >>> rename("layers.0.q", {"": "model"}), rename("layers.0.q", {"model": ""})
    ('model.layers.0.q', 'layers.0.q')
    """
    segments = name.split(".")
    for old, new in rules.items():
        before, after = (text.split(".") if text else [] for text in (old, new))
        for i in range(len(segments) - len(before) + 1):
            if segments[i : i + len(before)] == before:
                segments[i : i + len(before)] = after
                break
    return ".".join(segments)


def renamed(names: Iterable[str], rules: Any) -> dict[str, str]:
    """Return the new names by the old ones.

    Raises:
      ConfigError: the rules are not a mapping of strings, change no name, or make two names equal.
    """
    names = list(names)
    texts = [*rules, *rules.values()] if isinstance(rules, Mapping) else [None]
    if not all(isinstance(x, str) for x in texts):
        raise ConfigError(f"rename must map parts of names to others, got {shown(rules)}")
    rules = {old.strip("."): new.strip(".") for old, new in rules.items()}
    for old, new in rules.items():
        if names and all(rename(name, {old: new}) == name for name in names):
            raise ConfigError(
                f"rename: {shown(old)!r} is in no name of the file; the first is {shown(names[0])}"
            )
    found = {name: rename(name, rules) for name in names}
    twice = [name for name, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise ConfigError(f"rename makes names equal: {shown(twice[0])}")
    return found


def find_rules(
    names: Sequence[str],
    weight_of: Callable[[str], str | None],
    base: Collection[str],
    candidates: Callable[[Sequence[str]], Iterable[Rule]] | None = None,
) -> dict[str, str]:
    """Return rules with which more names are in the base, without two names becoming equal.

    Args:
      names: the file's.
      weight_of: returns the base's weight that a name is about, or None.
      base: the names of the base's weights.
      candidates: returns rules that may help these names, the best first; None for `prefix_rules`.
    """
    of_prefixes = lambda lost: prefix_rules([x for n in lost if (x := weight_of(n))], base)
    candidates = candidates or of_prefixes
    fits = lambda names: {i for i, name in enumerate(names) if weight_of(name) in base}
    rules: dict[str, str] = {}
    for _ in range(_MOST):
        now = [rename(name, rules) for name in names]
        known, best, most = fits(now), None, (False, 0)
        lost = [name for i, name in enumerate(now) if i not in known]
        for old, new in candidates(lost) if lost else ():
            after = [rename(name, rules | {old: new}) for name in names]
            then = fits(after)
            gain = (known <= then, len(then) - len(known) or int(_is_step(old, new, now)))
            if old not in rules and gain[1] > 0 and gain > most and len(set(after)) == len(after):
                best, most = (old, new), gain
        if best is None:
            break
        rules[best[0]] = best[1]
    gained = len(fits([rename(name, rules) for name in names])) - len(fits(names))
    return rules if gained > 0 else {}


def _is_step(old: str, new: str, names: Sequence[str]) -> bool:
    """Return whether a rule that is not enough by itself may be the first of several."""
    return (not new or new.endswith(old)) and all(rename(x, {old: new}) != x for x in names)


def prefix_rules(lost: Sequence[str], base: Iterable[str], start: str = "") -> Iterator[Rule]:
    """Yield rules that turn names of weights into names of the base, the most frequent first.

    What differs must stand before the last two names ("q_proj.weight") and the first number.

    Args:
      lost: names of weights that the base does not have.
      base: the base's names.
      start: what is before these names in the file, where rules are anchored.

    >>> next(prefix_rules(["bert.layer.0.q.weight"], ["layer.0.q.weight"], "base_model.model"))
    ('base_model.model.bert', 'base_model.model')
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in base:
        segments = name.split(".")
        for i in range(len(segments) - 1):
            ends[".".join(segments[i:])].append(name)
    votes: Counter[Rule] = Counter()
    for name in list(lost)[:50]:
        segments = name.split(".")
        tails = [".".join(segments[i:]) for i in range(len(segments) - 1)]
        tail = next((tail for tail in tails if tail in ends), None)
        for other in ends[tail][:20] if tail else ():
            votes.update(_rules(name, other, tail or "", start))
    yield from (rule for rule, _ in votes.most_common(8))


def _rules(name: str, other: str, tail: str, start: str) -> list[Rule]:
    """Return what turns a name into another that ends alike; nothing if it is more than a part.

    A prefix is told with and without the name that follows it, where not all names have it.
    """
    old, new = (x.removesuffix(tail).rstrip(".").split(".") for x in (name, other))
    old, new = ([x for x in part if x] for part in (old, new))
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    if any(x.isdigit() for x in (*old[same:], *new[same:])):
        return []
    if same:  # within the name: only something more, as "_orig_mod"
        return [(".".join(old[same:]), "")] if len(new) == same else []
    next_name = tail.partition(".")[0]
    ends = [[], [next_name]] if not next_name.isdigit() else [[]]
    join = lambda names, end: ".".join(filter(None, [start, *names, *end]))
    return [(join(old, end), join(new, end)) for end in ends]


def describe(rules: Mapping[str, str], names: Iterable[str]) -> str:
    """Return the line about these names of a file, which the rules would mend."""
    changed = [name for name in names if rename(name, rules) != name]
    parts = [
        f"{shown(old or 'nothing')} where the base has {shown(new or 'nothing')}"
        for old, new in rules.items()
    ]
    words = " ".join(f"--rename {shown(old)}={shown(new)}" for old, new in rules.items())
    return (
        f"{len(changed)} names, such as {shown(changed[0])}, have {' and '.join(parts)}: pass "
        f"rename={dict(rules)!r}, or on the command line {words} (for train, of lora-jax convert "
        "first)"
    )
