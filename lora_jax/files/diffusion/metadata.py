"""The metadata of LoRA files: PEFT's configuration in diffusers' files, and kohya's `ss_` keys."""

import json
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.files.diffusion.components import COMPONENTS
from lora_jax.files.disk import strict_json
from lora_jax.files.peft.config import PeftConfig, parse_config
from lora_jax.files.peft.config_from_contents import alpha_of
from lora_jax.files.torch_adapters.factors import TorchFactors

#: diffusers' key of a JSON object that has the configurations of all components: "unet.r".
KEY = "lora_adapter_metadata"
_DYNAMIC = "Dynamic"  # kohya's word where modules differ


def read_configs(source: str, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Return PEFT's configuration of each component in a file's metadata, "" of one alone.

    Raises:
      AdapterFileError: the metadata cannot be used; the file, key and values are named.
    """
    if KEY not in metadata:
        return {}
    values = strict_json.parse_json(metadata[KEY].encode(), f"{source}: {KEY}")
    if not isinstance(values, dict):
        raise AdapterFileError(f"{source}: {KEY} must be a JSON object")
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, dot, own = key.partition(".")
        if not dot or component not in COMPONENTS:
            component, own = "", key
        found.setdefault(component, {})[own] = value
    return {name: _parse(source, name, one) for name, one in found.items()}


def _parse(source: str, component: str, values: Mapping[str, Any]) -> PeftConfig:
    where = f"{source}: {KEY}" + (f" of {component}" if component else "")
    try:
        config = parse_config(json.dumps({"peft_type": "LORA", **values}).encode())
    except ConfigError as error:
        raise AdapterFileError(f"{where}: {error}") from None
    if config.changes_base:
        raise AdapterFileError(
            f"{where}: {config.changes_base} changed the base that the adapter was trained on; "
            "save it in diffusers or PEFT as one of the original base first"
        )
    return config


def of_diffusers(configs: Mapping[str, PeftConfig]) -> dict[str, str]:
    """Return a file's metadata with these configurations by component."""
    values = {
        f"{component}.{key}": value
        for component, config in configs.items()
        for key, value in json.loads(config.to_json()).items()
    }
    return {"format": "pt", KEY: json.dumps(values, indent=2, sort_keys=True)}


def of_kohya(factors: Mapping[str, TorchFactors]) -> dict[str, str]:
    """Return the metadata that kohya's trainer gives a file with these factors, by module.

    >>> import numpy as np
    >>> one = TorchFactors(np.ones((4, 8)), np.ones((8, 4)), 0.5)
    >>> of_kohya({"lora_unet_conv_in": one})["ss_network_alpha"]
    '2'
    """
    plain = [x for x in factors.values() if not _is_convolution(x)]
    kernels = [x for x in factors.values() if _is_convolution(x)]
    found = {"format": "pt", "ss_network_module": "networks.lora"}
    if plain or kernels:
        rank, alpha = _common(plain or kernels)
        found |= {"ss_network_dim": rank, "ss_network_alpha": alpha}
    if plain and kernels:
        rank, alpha = _common(kernels)
        found["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    return found


def _is_convolution(one: TorchFactors) -> bool:
    return any(size != 1 for size in one.a.shape[2:])


def _common(factors: list[TorchFactors]) -> tuple[str, str]:
    """Return the rank and alpha of factors as texts, or the word for several."""
    ranks = {str(one.rank) for one in factors}
    alphas = {str(alpha_of(one.scale, one.rank, False)) for one in factors}
    return tuple(x.pop() if len(x) == 1 else _DYNAMIC for x in (ranks, alphas))  # type: ignore[return-value]
