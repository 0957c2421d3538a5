"""LoRA for any JAX program: pure functions that put A and B beside the weights of a pytree."""

import importlib
from typing import TYPE_CHECKING, Any


    AdapterFileError,
    ConfigError,
    DenseError,
    DenseWarning,
    LayoutError,
    LeftOutWarning,
    LoraError,
    MergeError,
    StructureError,
    TargetError,
)
from lora_jax import initializers
from lora_jax.adapters.extract import extract
from lora_jax.adapters.init import init
from lora_jax.adapters.memory import MemoryReport, StepMemory, memory_report
from lora_jax.adapters.merge import merge, unmerge
from lora_jax.adapters.norms import norms
from lora_jax.adapters.on_original import on_original
from lora_jax.adapters.opened import partition_specs
from lora_jax.adapters.optim import freeze, groups, labels, lora_fa, lora_plus, mask
from lora_jax.adapters.split import join, split
from lora_jax.adapters.summary import count_params, summary
from lora_jax.adapters.switches import disable, set_scale, with_dropout
from lora_jax.adapters.updates import apply_updates, schedule_free_eval_params
from lora_jax.core.config import LoraConfig, Override
from lora_jax.core.errors import (
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.engine.custom_rules import Operand, Rule
from lora_jax.engine.forms import Forms
from lora_jax.engine.remat import save_sums
from lora_jax.engine.transform import lora
from lora_jax.files.native import load, read_metadata, save
from lora_jax.initializers import rounding
from lora_jax.initializers.eva import eva
from lora_jax.initializers.lora_ga import lora_ga
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
    "LeftOutWarning",
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
    "partition_specs",
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
    "value_and_grad_from_state",
    "with_dropout",
]

# What is imported at its first use: rooms and formats need more packages, and JAX, which all public
# names need, takes longer than all that `lora-jax --help` does.
_LAZY = {
    **{name: f"lora_jax.{name}" for name in ("layers", "models", "training")},
    **{name: f"lora_jax.files.{name}" for name in ("loralib", "mlx", "naming", "peft")},
}
_ROOMS = ("adapters", "core", "engine", "files")


def __getattr__(name: str) -> Any:
    """Import a public name, a module of `_LAZY` or a room at its first use."""
    if name in _LAZY:
        value = importlib.import_module(_LAZY[name])
    elif name in __all__ or name in _ROOMS:
        public = importlib.import_module("lora_jax.public")  # which imports all modules of _ROOMS
        value = globals()[name] if name in _ROOMS else getattr(public, name)
    else:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those of `_LAZY` among them."""
    return sorted({*__all__, *_LAZY, "__version__", "__doc__", "__file__", "__name__", "__path__"})
