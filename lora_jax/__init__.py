"""LoRA for any JAX program: pure functions that put A and B beside the weights of a pytree."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.files import loralib, mlx, naming, peft
    from lora_jax.public import *

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "DenseError",
    "DenseWarning",
    "Forms",
    "Layout",
    "LayoutError",
    "LoraConfig",
    "LoraError",
    "LoraWeight",
    "MemoryReport",
    "MergeError",
    "Operand",
    "Override",
    "Rule",
    "StepMemory",
    "StructureError",
    "TargetError",
    "TrainedLeaf",
    "TrainedRows",
    "apply_updates",
    "count_params",
    "disable",
    "eva",
    "extract",
    "freeze",
    "groups",
    "init",
    "initializers",
    "join",
    "labels",
    "load",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_plus",
    "loralib",
    "mask",
    "memory_report",
    "merge",
    "mlx",
    "naming",
    "norms",
    "on_original",
    "peft",
    "read_metadata",
    "rounding",
    "save",
    "save_sums",
    "schedule_free_eval_params",
    "set_scale",
    "split",
    "summary",
    "unmerge",
    "with_dropout",
]

# Imported at its first use: JAX takes longer than all that `lora-jax --help` does, and rooms and
# formats need more packages.
_MODULES = {
    **{name: f"lora_jax.{name}" for name in ("layers", "models", "training")},
    **{name: f"lora_jax.files.{name}" for name in ("loralib", "mlx", "naming", "peft")},
}


def __getattr__(name: str) -> Any:
    """Import a public name or a module of `_MODULES` at its first use."""
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in __all__:
        value = getattr(importlib.import_module("lora_jax.public"), name)
    else:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    globals()[name] = value
    return value
