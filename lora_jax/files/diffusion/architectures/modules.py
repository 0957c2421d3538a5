"""One module of a published model, and the lists of which models are made."""

import dataclasses
from collections.abc import Iterator

#: The kinds of modules; the two without adapters are norms and embeddings.
LINEAR, CONV, NORM, EMBEDDING = "linear", "conv", "norm", "embedding"


@dataclasses.dataclass(frozen=True)
class Module:
    """A module with a weight, as diffusers and transformers name it.

    Attributes:
      name: "mid_block.resnets.0.conv1", within its component.
      kind: "linear", "conv", "norm" or "embedding".
      shape: of the weight in PyTorch.
      bias: whether it has a bias too.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = True


def linear(name: str, out: int, ins: int, *, bias: bool = True) -> Module:
    """Return a linear layer."""
    return Module(name, LINEAR, (out, ins), bias)


def conv(name: str, out: int, ins: int, size: int = 3) -> Module:
    """Return a convolution with a square kernel."""
    return Module(name, CONV, (out, ins, size, size))


def norm(name: str, width: int, *, bias: bool = True) -> Module:
    """Return a norm with a weight."""
    return Module(name, NORM, (width,), bias)


def within(prefix: str, modules: Iterator[Module]) -> Iterator[Module]:
    """Yield modules with a prefix before each name."""
    for one in modules:
        yield dataclasses.replace(one, name=f"{prefix}.{one.name}")
