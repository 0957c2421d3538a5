"""LoRA for any JAX program: pure functions that put A and B beside the weights of a pytree."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.files import diffusion, gguf, loralib, mlx, naming, orbax, peft
    from lora_jax.frameworks import equinox as equinox
    from lora_jax.frameworks import nnx as nnx
    from lora_jax.public import *

__version__ = "0.1.0"

__all__ = [
    "QUANTIZED_KINDS",
    "AdapterFileError",
    "BaseKindWarning",
    "ConfigError",
    "DenseError",
    "DenseWarning",
    "Forms",
    "Intruders",
    "Layout",
    "LayoutError",
    "LeftOutWarning",
    "LoraConfig",
    "LoraError",
    "LoraWeight",
    "MemoryReport",
    "MergeError",
    "Operand",
    "OtherProcessError",
    "Outcome",
    "Override",
    "QuantizedWeight",
    "Rule",
    "Run",
    "StepMemory",
    "StructureError",
    "Sweep",
    "SweepState",
    "TargetError",
    "TrainedLeaf",
    "TrainedRows",
    "apply_updates",
    "combine",
    "compress",
    "count_params",
    "dequantize",
    "diffusion",
    "disable",
    "eva",
    "extract",
    "freeze",
    "from_qwix",
    "gguf",
    "grid",
    "groups",
    "halving",
    "init",
    "initializers",
    "intruders",
    "join",
    "labels",
    "load",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_muon",
    "lora_plus",
    "lora_rite",
    "loralib",
    "mask",
    "memory_report",
    "merge",
    "mlx",
    "naming",
    "norms",
    "on_original",
    "orbax",
    "partition_specs",
    "peft",
    "quantize",
    "read_metadata",
    "reduce_intruders",
    "resize",
    "riemannian",
    "rounding",
    "save",
    "save_sums",
    "schedule_free_eval_params",
    "select",
    "set_scale",
    "set_slot",
    "shardings",
    "split",
    "stack",
    "summary",
    "sweep",
    "unmerge",
    "unstack",
    "value_and_grad_from_state",
    "with_dropout",
]

# What is imported at its first use: rooms and formats need more packages, and JAX, which all public
# names need, takes longer than all that `lora-jax --help` does.
_LAZY = {
    **{name: f"lora_jax.{name}" for name in ("layers", "models", "training")},
    **{name: f"lora_jax.frameworks.{name}" for name in ("equinox", "nnx")},
    **{
        name: f"lora_jax.files.{name}"
        for name in ("diffusion", "gguf", "loralib", "mlx", "naming", "orbax", "peft")
    },
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
