"""What an adapter file contributes to a base, by PyTorch's names and axes, in any format."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.weights import is_adapted
from lora_jax.files.disk.processes import to_host
from lora_jax.files.naming import Naming, Place, index
from lora_jax.files.naming.translation import shapes
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors, concatenate

_SUGGESTED = 20  # unknown names that are told with the nearest ones


@dataclasses.dataclass
class Contents:
    """Adapters as files have them. Each key is a tensor's name in PyTorch ("h.0.up.weight")."""

    factors: dict[str, TorchFactors] = dataclasses.field(default_factory=dict)
    #: The factors of parameters that contain experts ("h.0.experts.up_proj").
    experts: dict[str, Experts] = dataclasses.field(default_factory=dict)
    whole: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # fully trained
    rows: dict[str, tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)
    #: What is added to a bias, already multiplied by the scale.
    added: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    #: Copies of base weights that were not trained.
    untrained: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0  # the rate at which the inputs of A are dropped in training


class TorchBase:
    """A base seen through its naming: the PyTorch model's tensors, their shapes and values."""

    def __init__(self, base: Any, naming: Naming, *, adapted_only: bool = False):
        """Find the tensors of a base.

        Args:
          base: a tree of arrays or `ShapeDtypeStruct`s.
          naming: of its leaves.
          adapted_only: whether `base` has only the adapted leaves, because the rest is unknown.
        """
        self.naming = naming
        self.adapted_only = adapted_only
        self.leaves, self.treedef = flatten_with_paths(base, is_leaf=is_adapted)
        shaped = {path: tuple(x.shape) for path, x in self.leaves.items() if hasattr(x, "shape")}
        self.places = naming.places(shaped)
        self.index = index(self.places)
        self._suggested = 0

    def within(self, module: str) -> "TorchBase":
        """Return the base seen from within a module, whose name all others lose."""
        found = copy.copy(self)
        prefix = f"{module}."
        found.index = {
            name.removeprefix(prefix): where
            for name, where in self.index.items()
            if name.startswith(prefix)
        }
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in PyTorch of a tensor in the index."""
        place, _, part = self.index[name][0]
        return shapes(place)[part]

    def kind(self, name: str) -> str:
        """Return the kind of a tensor's module: "linear", "conv", ..., or ""."""
        return self.index[name][0][0].entry.kind

    def outputs(self, name: str) -> int:
        """Return the number of outputs of this weight's module."""
        return self.shape(name)[self.index[name][0][0].entry.out_axis]

    def adaptable(self) -> list[str]:
        """List the weights of modules that can have factors."""
        return [name for name in self.index if self.kind(name) and not self.has_experts(name)]

    def experts(self) -> list[str]:
        """List the parameters that contain experts."""
        return [name for name in self.index if self.has_experts(name)]

    def has_experts(self, name: str) -> bool:
        """Return whether this parameter contains experts."""
        return self.index[name][0][0].entry.has_experts

    def count(self, name: str) -> int:
        """Return the number of experts in a parameter."""
        return self.shape(name)[0]

    def sides(self, name: str) -> tuple[int, int]:
        """Return the numbers of outputs and inputs of each expert in a parameter."""
        _, first, last = self.shape(name)
        return (last, first) if self.index[name][0][0].entry.out_axis == 2 else (first, last)

    def row(self, name: str) -> tuple[int, int]:
        """Return a tensor's place in the naming: its row, and which of the row's names it has."""
        place, _, part = self.index[name][0]
        return self.naming.entries.index(place.entry), part

    def unknown(self, name: str) -> str:
        """Return the end of a message about a name that the base does not have.

        Only the first ones come with the nearest names, which take time to find.
        """
        self._suggested += 1
        if self._suggested > _SUGGESTED:
            return "not in this base"
        return f"not in this base; {nearest(name, self.index)}"

    def value(self, name: str) -> np.ndarray | None:
        """Return a tensor of the base, or None if the base lacks values or leaves of it."""
        found = []
        for place, where, part in self.index[name]:
            leaf = self.leaves[place.path]
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return None
            values = np.asarray(to_host(dequantized(leaf)))
            found.append((place.start, part_of(place, values, where, part)))
        found.sort(key=lambda item: item[0])
        place = self.index[name][0][0]
        if len(found) < len(place.entry.paths):
            return None
        parts = [x for _, x in found]
        return concatenate(parts, place.entry.out_axis)


def part_of(place: Place, leaf: np.ndarray, where: tuple[int, ...], part: int) -> np.ndarray:
    """Return one layer's tensor in a leaf: the one numbered `part` if the leaf joins several."""
    weight = place.weight_to_torch(leaf[place.at(where)])
    if len(place.entry.torch_names) == 1:
        return weight
    return np.split(weight, np.cumsum(place.widths)[:-1], place.entry.out_axis)[part]


def module_of(name: str) -> str:
    """Return the module of a tensor: `"h.0.up"` for `"h.0.up.weight"`."""
    return name.rpartition(".")[0]


def dtype_problem(x: Any) -> str | None:
    """Return why a tensor of this dtype cannot be trained, or None if it can."""
    if x.dtype.name in ("float32", "float16", "bfloat16", "float64"):
        return None
    return f"is {x.dtype}, but only floating-point tensors can be trained"


def by_leaf(names: Mapping[str, Any], model: TorchBase) -> dict[str, None]:
    """Return the paths of the leaves that contain these tensors, as an ordered set."""
    return {place.path: None for name in names for place, _, _ in model.index[name]}
