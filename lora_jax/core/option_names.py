"""The options of `LoraConfig` under the names that other libraries have for them."""

import difflib
from collections.abc import Iterable, Sequence

from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown

#: What to write for an option of PEFT, mlx-lm, loralib or qwix.
_MEANT = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "module_path": "targets",
    "keys": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "trainable_token_indices": "rows",
    "layers_to_transform": "layers",
    "num_layers": "layers=slice(-n, None)",
    "use_dora": "dora",
    "use_rslora": 'scaling="rslora"',
    "init_lora_weights": "init",
    "rank_pattern": 'overrides={"name": {"rank": 4}}',
    "alpha_pattern": 'overrides={"name": {"alpha": 8}}',
    "scale": "alpha (the scale times the rank)",
    "task_type": "peft.save(..., task_type=)",
    "base_model_name_or_path": "peft.save(..., base_model=)",
    "fan_in_fan_out": "nothing: the layouts come from the program",
}


def check_options(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ConfigError that lists the options that `LoraConfig` lacks, with what is meant.

    >>> check_options(["r", "targts"], ["rank", "targets"])
    Traceback (most recent call last):
    lora_jax.core.errors.ConfigError: LoraConfig has other options: for r write rank; for targts ...
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    found = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        meant = _MEANT.get(name) or (near[0] if near else "one of " + ", ".join(known))
        found.append(f"for {shown(name)} write {meant}")
    raise ConfigError("LoraConfig has other options: " + "; ".join(found))
