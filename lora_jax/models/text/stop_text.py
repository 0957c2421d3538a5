"""End a stream of text where a given text appears in it."""

from collections.abc import Iterable, Iterator, Sequence


def until_text(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text as they arrive, up to the first of `stops` that is complete.

    A stop may begin in one piece and end in another, so an end of a piece that could begin one is
    held back until more arrives. What comes before the stop is yielded, the stop itself is not.
    The pieces joined do not depend on where the pieces were cut.

    Args:
      pieces: parts of the text; the rest is not asked for after a stop.
      stops: texts, none of them empty.

    >>> list(until_text(["one, t", "wo. Th", "ree"], ["o. T"]))
    ['one, t', 'w']
    >>> list(until_text(["a\\n", "b"], ["\\n\\n"]))
    ['a', '\\nb']
    """
    if not all(stops):
        raise ValueError("a stop text must not be empty")
    held = ""
    for piece in pieces:
        held += piece
        ends = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if ends:
            if text := held[: min(ends)[1]]:
                yield text
            return
        kept = max((_overlap(held, stop) for stop in stops), default=0)
        text, held = held[: len(held) - kept], held[len(held) - kept :]
        if text:
            yield text
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
