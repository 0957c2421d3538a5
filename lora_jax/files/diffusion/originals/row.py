"""One module of an original code, and the modules of diffusers that it is."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Original(NamedTuple):
    """A module of the original code, and the modules of diffusers that it joins along its outputs.

    In names `{n}` is the number of a block. `halves` says that the two halves of its outputs are in
    the other order there.
    """

    name: str
    parts: tuple[str, ...]
    halves: bool = False


def block(name: str, to: str, modules: Mapping[str, str | tuple[str, ...]]) -> Iterator[Original]:
    """Yield the modules of one kind of block.

    >>> [*block("blocks.{n}", "layers.{n}", {"qkv": ("q", "k")})]
    [Original(name='blocks.{n}.qkv', parts=('layers.{n}.q', 'layers.{n}.k'), halves=False)]
    """
    for own, parts in modules.items():
        each = (parts,) if isinstance(parts, str) else parts
        yield Original(f"{name}.{own}", tuple(f"{to}.{part}" for part in each))


def outside(modules: Mapping[str, str]) -> Iterator[Original]:
    """Yield modules that are in no block."""
    for own, part in modules.items():
        yield Original(own, (part,))
