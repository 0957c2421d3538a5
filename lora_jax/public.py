"""The public names that need JAX: `import lora_jax` imports this module at their first use."""

from lora_jax import initializers
from lora_jax.adapters.algebra.combine import combine
from lora_jax.adapters.algebra.compress import compress, resize
from lora_jax.adapters.algebra.intruders import Intruders, intruders, reduce_intruders
from lora_jax.adapters.extract import extract
from lora_jax.adapters.init import init
from lora_jax.adapters.memory import MemoryReport, StepMemory, memory_report
from lora_jax.adapters.merge import merge, unmerge
from lora_jax.adapters.norms import norms
from lora_jax.adapters.on_original import on_original
from lora_jax.adapters.opened import partition_specs
from lora_jax.adapters.optim import freeze, groups, labels, lora_fa, lora_plus, mask
from lora_jax.adapters.optimizers.muon import lora_muon
from lora_jax.adapters.optimizers.riemannian import riemannian
from lora_jax.adapters.optimizers.rite import lora_rite
from lora_jax.adapters.quantize import dequantize, quantize
from lora_jax.adapters.shardings import shardings
from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.select import select, set_slot
from lora_jax.adapters.stacks.stack import stack, unstack
from lora_jax.adapters.summary import count_params, summary
from lora_jax.adapters.sweeps.halving import Outcome, halving
from lora_jax.adapters.sweeps.run import Run, grid
from lora_jax.adapters.sweeps.state import SweepState
from lora_jax.adapters.sweeps.sweep import Sweep, sweep
from lora_jax.adapters.switches import disable, set_scale, with_dropout
from lora_jax.adapters.updates import (
    apply_updates,
    schedule_free_eval_params,
    value_and_grad_from_state,
)
from lora_jax.core.config import LoraConfig, Override
from lora_jax.core.errors import (
    AdapterFileError,
    BaseKindWarning,
    ConfigError,
    DenseError,
    DenseWarning,
    LayoutError,
    LeftOutWarning,
    LoraError,
    MergeError,
    OtherProcessError,
    StructureError,
    TargetError,
)
from lora_jax.core.layout import Layout
from lora_jax.core.quantized.kinds import QUANTIZED_KINDS
from lora_jax.core.quantized.qwix import from_qwix
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.engine.custom_rules import Operand, Rule
from lora_jax.engine.forms import Forms
from lora_jax.engine.remat import save_sums
from lora_jax.engine.transform import lora
from lora_jax.files.native import load, read_metadata, save
from lora_jax.initializers import rounding
from lora_jax.initializers.eva import eva
from lora_jax.initializers.lora_ga import lora_ga

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
    "disable",
    "eva",
    "extract",
    "freeze",
    "from_qwix",
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
    "mask",
    "memory_report",
    "merge",
    "norms",
    "on_original",
    "partition_specs",
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
