"""A random model of transformers, and how the same is computed there and here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from lora_jax import models
from tests.stress.model_configs.draw import Draw

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A random model of transformers, and how to compute the same there and here.

    Attributes:
      model: in float32.
      inputs: by name.
      theirs: `(model, inputs) -> outputs`.
      ours: `(pretrained, inputs) -> outputs`, with the parameters as in `pretrained.params`. What
        it raises as `ValueError` refuses the configuration too.
      draw: what it was made by. One of its unusual fields must be named where the configuration
        is refused.
    """

    model: torch.nn.Module
    inputs: Arrays
    theirs: Callable[[Any, Arrays], Arrays]
    ours: Callable[[models.Pretrained, Arrays], Arrays]
    draw: Draw


def run(function: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Compute a function of parameters and arrays, compiled quickly."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(params, *args)
