"""Random values of a configuration's fields, most of them the usual ones."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

#: Every name that transformers has for an activation without parameters.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
    *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
    *("mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)


class Draw:
    """A source of random fields.

    Attributes:
      random: where the numbers come from.
      one_of: chooses one of a sequence.
      changed: the fields of `field` that are not the usual ones.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.one_of = self.random.choice
        self.changed: dict[str, Any] = {}

    def rarely(self) -> bool:
        return self.random.random() < 0.2

    def seldom(self, usual: Any, *others: Any) -> Any:
        """Return the usual value, in one case of three another one."""
        return self.one_of(others) if self.random.random() < 1 / 3 else usual

    def activation(self, usual: str) -> str:
        return self.one_of(ACTIVATIONS) if self.random.random() < 0.05 else usual

    def field(self, name: str, usual: Any, *others: Any, share: float = 0.5) -> Any:
        """Return the usual value of a field or, in a `share` of all cases, one of the others."""
        if self.random.random() >= share:
            return usual
        value = self.random.choice(others)
        if value != usual:
            self.changed[name] = value
        return value

    def fields(self, table: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Return fields by name: {name: (usual, *others)}."""
        return {name: self.field(name, *values) for name, values in table.items()}

    @property
    def arrays(self) -> np.random.Generator:
        """A generator of arrays."""
        return np.random.default_rng(self.random.getrandbits(32))


def shorten(draw: Draw, settings: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
    """Leave out some of the values that the class in transformers has anyway."""
    kind = transformers.CONFIG_MAPPING[settings["model_type"]]
    usual = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}
    for name in [*settings]:
        is_usual = name in usual and usual[name] == settings[name]
        if name not in ("model_type", *keep) and is_usual and draw.random.random() < 0.8:
            del settings[name]


def randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Return a model with random values of a size that lets no parameter be without effect."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=made)
            if parameter.ndim < 2:
                parameter += 0.2 * noise
            else:
                width = parameter[0].numel()
                parameter.copy_(noise * (0.5 if width < 1 else min(0.5, width**-0.5)))
    return model.eval()
