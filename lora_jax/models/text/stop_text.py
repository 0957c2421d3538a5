"""End a stream of text where a given text appears in it."""

from collections.abc import Iterable, Iterator, Sequence


class StopText:
    """The part of a text before the first of some stops that is complete, as the text arrives.

    A stop may begin in one piece and end in another, so an end of a piece that could begin one is
    held back until more arrives. What comes before the stop is returned, the stop itself is not.
    The pieces joined do not depend on where the pieces were cut.

    Args:
      stops: texts, none of them empty.

    Attributes:
      ended: whether a stop has appeared.

    Raises:
      ValueError: one of the stops is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop text must not be empty")
        self.ended = False
        self._stops, self._held = stops, ""

    def push(self, piece: str) -> str:
        """Return what is certain to be before a stop, now that this piece is there."""
        self._held += piece
        ends = [(at + len(x), at) for x in self._stops if (at := self._held.find(x)) >= 0]
        if ends:
            self.ended = True
            return self._held[: min(ends)[1]]
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def end(self) -> str:
        """Return what was held back, where the text ends without a stop."""
        return "" if self.ended else self._held


def until_text(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text as they arrive, up to the first of `stops` that is complete.

    Args:
      pieces: parts of the text; the rest is not asked for after a stop.
      stops: as in `StopText`.

    >>> list(until_text(["one, t", "wo. Th", "ree"], ["o. T"]))
    ['one, t', 'w']
    >>> list(until_text(["a\\n", "b"], ["\\n\\n"]))
    ['a', '\\nb']
    """
    stop = StopText(stops)
    for piece in pieces:
        if text := stop.push(piece):
            yield text
        if stop.ended:
            return
    if rest := stop.end():
        yield rest


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
