"""What the adapter file of a PyTorch library contains, read without its base model."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.files.disk import strict_json
from lora_jax.files.torch_adapters.contents import dtype_problem
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors

#: The kind of a module, as in `Entry.kind`, and the shape of its weight in PyTorch.
ImpliedWeight = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class FileContents:
    """What a file says by itself: nothing is compared with a base yet.

    Attributes:
      variant: "LoRA", "rsLoRA", "LoRA, DoRA", ...
      base_model: the name or path of the base model; None where the file does not say it.
      use_rslora: whether the scale is α/√rank, and not α/rank.
      factors: A, B and the scale by module ("h.0.up"), or those of its experts.
      others: the shape of every other tensor (biases, heads, rows, magnitudes).
      weights: the weights that a base for this file must have, by PyTorch's names
        ("h.0.up.weight").
      problems: by module, why its factors cannot be used.
    """

    variant: str
    base_model: str | None
    use_rslora: bool
    factors: Mapping[str, TorchFactors | Experts]
    others: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, ImpliedWeight]
    problems: Mapping[str, str]

    def require_whole(self, path: Path) -> "FileContents":
        """Return these contents.

        Raises:
          AdapterFileError: there are problems; all are listed.
        """
        if self.problems:
            lines = [f"{module}: {problem}" for module, problem in self.problems.items()]
            raise AdapterFileError(f"{path}: the adapter is damaged:\n" + strict_json.lines(lines))
        return self


def missing_factor(fields: Mapping[str, np.ndarray], a: str, b: str) -> str | None:
    """Return what is wrong where a module has only one of its two factors, else None."""
    if (a in fields) == (b in fields):
        return None
    there, absent = (a, b) if a in fields else (b, a)
    return f"has {there} but not {absent}"


def factor_problem(fields: Mapping[str, np.ndarray], endings: Collection[str]) -> str | None:
    """Return why some tensor of a module cannot be a factor of any weight, or None.

    Args:
      fields: the module's tensors by ending.
      endings: the endings of factors.

    >>> factor_problem({"lora_a": np.ones((0, 4), "f4"), "m": np.ones(4, "f4")}, ["lora_a"])
    'lora_a has shape (0, 4), but a factor is a matrix that is not empty'
    """
    for ending, x in fields.items():
        if dtype_problem(x):
            return f"{ending} {dtype_problem(x)}"
        if ending in endings and (x.ndim < 2 or x.size == 0):
            return f"{ending} has shape {x.shape}, but a factor is a matrix that is not empty"
    return None


def weight_shape(kind: str, factors: TorchFactors) -> tuple[int, ...]:
    """Return the shape in PyTorch of the weight that these factors adapt.

    >>> factors = TorchFactors(np.ones((2, 5), "f4"), np.ones((3, 2), "f4"), 1.0)
    >>> weight_shape("linear", factors), weight_shape("embedding", factors)
    ((3, 5), (5, 3))
    """
    out, ins = factors.outputs, factors.a.shape[1:]
    return (*ins, out) if kind in ("conv1d", "embedding") else (out, *ins)
