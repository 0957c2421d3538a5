"""LoRA for any JAX program: pure functions that put A and B beside the weights of a pytree."""

from lora_jax import rounding, starts
from lora_jax.adapt import init
from lora_jax.checkpoint import load, read_metadata, save
from lora_jax.config import LoraConfig, Override
from lora_jax.conversion import on_original
from lora_jax.custom_rules import Operand, Rule
from lora_jax.errors import (
    AdapterFileError,
    ConfigError,
    DenseError,
    DenseWarning,
    LayoutError,
    LoraError,
    MergeError,
    StructureError,
    TargetError,
)
from lora_jax.eva import eva
from lora_jax.extract import extract
from lora_jax.forms import Forms
from lora_jax.lora_ga import lora_ga
from lora_jax.memory import MemoryReport, StepMemory, memory_report
from lora_jax.merging import merge, unmerge
from lora_jax.norms import norms
from lora_jax.optim import freeze, groups, labels, lora_fa, lora_plus, mask
from lora_jax.overlay import disable, join, set_scale, split, with_dropout
from lora_jax.remat import save_sums
from lora_jax.summary import count_params, summary
from lora_jax.transform import lora
from lora_jax.weights import Layout, LoraWeight, TrainedLeaf, TrainedRows

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
    "count_params",
    "disable",
    "eva",
    "extract",
    "freeze",
    "groups",
    "init",
    "join",
    "labels",
    "load",
    "lora",
    "lora_fa",
    "lora_ga",
    "lora_plus",
    "mask",
    "memory_report",
    "merge",
    "norms",
    "on_original",
    "read_metadata",
    "rounding",
    "save",
    "save_sums",
    "set_scale",
    "split",
    "starts",
    "summary",
    "unmerge",
    "with_dropout",
]
