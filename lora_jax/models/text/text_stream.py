"""Decode token ids as they arrive."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what part of a character decodes to


class TextStream:
    """The text of ids that arrive one by one, in pieces that end at a character boundary.

    The pieces joined are what `decode` makes of all ids.

    Args:
      decode: ids to text.

    >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [stream.push(i) for i in "aé".encode()], stream.end()
    (['a', '', 'é'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # ids whose text is not complete yet, after one whose text is
        self._shown = ""

    def push(self, i: int) -> str:
        """Return the text that one more id completes, which may be empty."""
        self._window.append(i)
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._shown) :]
        # one id stays as context: some decoders drop a space at the start
        self._window = self._window[-1:]
        self._shown = self._decode(self._window)
        return new

    def end(self) -> str:
        """Return the text of ids that completed no character."""
        return self._decode(self._window)[len(self._shown) :]
