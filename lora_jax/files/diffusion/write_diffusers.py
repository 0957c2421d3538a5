"""Adapters under diffusers' names, and PEFT's configuration of each component."""

import dataclasses
from typing import Any

import numpy as np

from lora_jax.core.config import LoraConfig
from lora_jax.files.peft import tensor_names
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.peft.config_from_contents import Target, build_config
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of


def to_diffusers(
    contents: Contents, model: TorchBase, config: LoraConfig | PeftConfig | None
) -> tuple[dict[str, np.ndarray], dict[str, PeftConfig]]:
    """Return a file's tensors, and the configuration of each component.

    Args:
      contents: factors of linear layers and convolutions.
      model: their base.
      config: what the adapters were made with, if it is known.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.factors.items():
        own: Any = tensor_names.to_tensors(module_of(name), model.kind(name), factors)
        tensors |= {key.removeprefix(tensor_names.PREFIX): x for key, x in own.items()}
    configs = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in contents.factors):
        prefix = f"{component}."
        inside = {
            n.removeprefix(prefix): x for n, x in contents.factors.items() if n.startswith(prefix)
        }
        within = model.within(component)
        target = Target(within, False, None)  # modules by their whole names, as diffusers has them
        own = dataclasses.replace(contents, factors=inside)
        configs[component] = build_config(own, [], target, config)
    return tensors, configs
