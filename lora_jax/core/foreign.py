"""Show text from files, paths and users in messages: short, and without control characters.

A tensor's name, a token or a path may hold what steers a terminal (ESC, BEL), turns the direction
of a line around (bidirectional marks), cannot be encoded (lone surrogates), or fills the screen.
"""

import re
import reprlib
from typing import Any

MOST = 240  # characters of one name or value
MOST_OF_MESSAGE = 20_000  # characters of one message
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 120


def shown(text: object, most: int = MOST) -> str:
    r"""Return text in one short line that is safe to print.

    Args:
      text: a string, or anything whose `str` is meant, as a path.
      most: a longer text keeps its beginning and its end, and says how many characters it has.

    >>> shown("layers.0.q_proj"), shown("a\x1b[2Jb\n"), shown("\ud800\u202e")
    ('layers.0.q_proj', 'a\\x1b[2Jb\\n', '\\ud800\\u202e')
    >>> shown("x" * 50 + "y" * 50, most=9)
    'xxxxxx...yyy (100 characters)'
    """
    return _escape(_shorten(str(text), most))


def shown_value(value: Any) -> str:
    """Return the `repr` of a value of any type, depth and size in one short line.

    >>> shown_value({"r": [8] * 99})
    "{'r': [8, 8, 8, 8, 8, 8, ...]}"
    """
    try:
        return shown(_REPR.repr(value))
    except Exception:  # a foreign object's repr can raise anything, as an integer's of 5,000 digits
        return f"a value of type {type(value).__name__}"


def escaped(text: str, most: int = MOST_OF_MESSAGE) -> str:
    r"""Return a whole message, whose line breaks stay, as `shown` does.

    >>> escaped("two are missing:\n  q\x07\n  k")
    'two are missing:\n  q\\x07\n  k'
    """
    return "\n".join(map(_escape, _shorten(text, most).split("\n")))


def for_terminal(text: str) -> str:
    r"""Return a text that a model wrote, for a terminal: only what would steer it is escaped.

    >>> for_terminal("a tab\tand \x1b[2J\n")
    'a tab\tand \\x1b[2J\n'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _shorten(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]}...{text[len(text) - end :]} ({len(text):,} characters)"


def _escape(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
