"""`Mutant`: one way to break the package, and the tests that should notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change to one file of the package."""

    name: str
    file: str
    old: str
    new: str
    selections: tuple[list[str], ...]  # arguments of pytest, one run each
