"""What an adapter file holds, by torch's names and with torch's axes, whatever the format."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.weights import is_adapted
from lora_jax.files.naming import Naming, Place, index
from lora_jax.files.naming.translation import shapes
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors


@dataclasses.dataclass
class Contents:
    """Adapters as files have them. Every key is a tensor's name in torch ("h.0.up.weight")."""

    factors: dict[str, TorchFactors] = dataclasses.field(default_factory=dict)
    #: Of parameters that hold experts; the key is the parameter's name ("h.0.experts.up_proj").
    experts: dict[str, Experts] = dataclasses.field(default_factory=dict)
    whole: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # trained whole
    rows: dict[str, tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)
    #: What is added to a bias; here already times the scale.
    added: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    #: Copies of base weights that were not trained.
    untrained: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class TorchBase:
    """A base through its naming: the tensors that torch's model has, their shapes and values."""

    def __init__(self, base: Any, naming: Naming, *, adapted_only: bool = False):
        """Find the tensors of a base.

        Args:
          base: a tree of arrays or `ShapeDtypeStruct`s.
          naming: of its leaves.
          adapted_only: whether `base` has only the adapted leaves, as there is no other.
        """
        self.naming = naming
        self.adapted_only = adapted_only
        self.leaves, self.treedef = flatten_with_paths(base, is_leaf=is_adapted)
        shaped = {path: tuple(x.shape) for path, x in self.leaves.items() if hasattr(x, "shape")}
        self.places = naming.places(shaped)
        self.index = index(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in torch of a tensor in the index."""
        place, _, part = self.index[name][0]
        return shapes(place)[part]

    def kind(self, name: str) -> str:
        """What the module of a tensor is: "linear", "conv", ..., or ""."""
        return self.index[name][0][0].entry.kind

    def outputs(self, name: str) -> int:
        """How many outputs the module of this weight has."""
        return self.shape(name)[self.index[name][0][0].entry.out_axis]

    def adaptable(self) -> list[str]:
        """The names of the weights of modules that can have factors."""
        return [name for name in self.index if self.kind(name) and not self.has_experts(name)]

    def experts(self) -> list[str]:
        """The names of the parameters that hold experts."""
        return [name for name in self.index if self.has_experts(name)]

    def has_experts(self, name: str) -> bool:
        """Whether this is a parameter of experts."""
        return self.index[name][0][0].entry.has_experts

    def count(self, name: str) -> int:
        """How many experts are in a parameter."""
        return self.shape(name)[0]

    def sides(self, name: str) -> tuple[int, int]:
        """How many outputs and inputs each expert of a parameter has."""
        _, first, last = self.shape(name)
        return (last, first) if self.index[name][0][0].entry.out_axis == 2 else (first, last)

    def row(self, name: str) -> tuple[int, int]:
        """Where a tensor is in the naming: its row, and which of the row's names it has."""
        place, _, part = self.index[name][0]
        return self.naming.entries.index(place.entry), part

    def value(self, name: str) -> np.ndarray | None:
        """A tensor of the base, None where it has no values (or not all of its leaves)."""
        found = []
        for place, where, part in self.index[name]:
            leaf = self.leaves[place.path]
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return None
            found.append((place.start, part_of(place, np.asarray(leaf), where, part)))
        found.sort(key=lambda item: item[0])
        place = self.index[name][0][0]
        if len(found) < len(place.entry.paths):
            return None
        parts = [x for _, x in found]
        return np.concatenate(parts, place.entry.out_axis) if len(parts) > 1 else parts[0]


def part_of(place: Place, leaf: np.ndarray, where: tuple[int, ...], part: int) -> np.ndarray:
    """One layer's tensor of a leaf: of several that the leaf joins the one numbered `part`."""
    weight = place.weight_to_torch(leaf[place.at(where)])
    if len(place.entry.torch_names) == 1:
        return weight
    return np.split(weight, np.cumsum(place.widths)[:-1], place.entry.out_axis)[part]


def module_of(name: str) -> str:
    """`"h.0.up.weight"` is in the module `"h.0.up"`."""
    return name.rpartition(".")[0]


def unknown(name: str, names: Iterable[str]) -> str:
    """The end of a message on a name that the base does not have."""
    return f"not in this base; {nearest(name, names)}"


def is_floating(x: Any) -> bool:
    """Whether a tensor has a dtype that can be trained."""
    return x.dtype.name in ("float32", "float16", "bfloat16", "float64")


def not_floating(x: Any) -> str:
    """Return the message on a tensor that `is_floating` rejects."""
    return f"is {x.dtype}, only floating tensors are trained"


def by_leaf(names: Mapping[str, Any], model: TorchBase) -> dict[str, None]:
    """The paths of the leaves that these tensors are in."""
    return {place.path: None for name in names for place, _, _ in model.index[name]}
