"""Random values of a configuration's fields, most of them the usual ones."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass
class Draw:
    """A source of random fields, which remembers those that are not usual.

    Attributes:
      random: where the numbers come from.
      changed: the unusual fields so far.
    """

    random: random.Random
    changed: dict[str, Any] = field(default_factory=dict)

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


def shortened(draw: Draw, text: str) -> str:
    """Return a config.json without some of the values that its class in transformers has anyway."""
    settings = json.loads(text)
    for part in (settings, settings.get("vision_config"), settings.get("text_config")):
        if part is None:
            continue
        kind = transformers.CONFIG_MAPPING[part["model_type"]]
        usual = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}
        for name in [*part]:
            is_usual = name in usual and usual[name] == part[name]
            if name != "model_type" and is_usual and draw.random.random() < 0.8:
                del part[name]
    return json.dumps(settings)


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
