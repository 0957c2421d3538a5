"""Turn the tensors of a PEFT file into `Contents`, with every name, shape and dtype checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.files.peft import target_parameters, tensor_names, tied_head
from lora_jax.files.peft.adapter_file import PeftFile
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.contents import (
    Contents,
    TorchBase,
    dtype_problem,
    unknown,
)


def read_contents(file: PeftFile, model: TorchBase) -> tuple[Contents, list[str]]:
    """Return what fits the base, and what is wrong with the rest."""
    config = file.config
    tied = tied_head.find(model)
    tensors, problems = file.tensors, list[str]()
    if tied is not None and config.ensure_weight_tying:
        tensors, problems = tied_head.drop_copies(tensors, tied)
    found = Contents(dropout=float(config.lora_dropout))
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        part = tensor_names.part_of_name(name, tensors, model.index)
        if part is None:
            problems.append(f"{name}: unexpected: PEFT's names start with {tensor_names.PREFIX}")
        elif dtype_problem(tensor):
            problems.append(f"{name}: {dtype_problem(tensor)}")
        elif part.field:
            by_module.setdefault(part.module, {})[part.field] = tensor
        elif part.module not in model.index:
            problems.append(f"{name}: {unknown(part.module, model.index)}")
        elif tensor.shape != model.shape(part.module):
            problems.append(_shape_problem(name, tensor.shape, model.shape(part.module)))
        elif tensor_names.is_base_weight(name):
            found.untrained[part.module] = tensor
        else:
            found.whole[part.module] = tensor
    wrapped, wrong = target_parameters.take(found, by_module, config, model)
    problems += wrong
    by_module = {module: x for module, x in by_module.items() if module not in wrapped}
    for module, parts in by_module.items():
        problems += _add(found, module, parts, config, model)
    problems += _missing(by_module, config, model)
    if tied is not None and not config.ensure_weight_tying:
        problems += tied_head.drop_lookup_alone(found, tied)
    return found, problems


def _shape_problem(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{name}: has shape {got}, needs {wanted}"


def _add(
    found: Contents,
    module: str,
    parts: dict[str, np.ndarray],
    config: PeftConfig,
    model: TorchBase,
) -> list[str]:
    """Add one module's tensors to `found`, or return what is wrong with them."""
    weight, full = f"{module}.weight", f"{tensor_names.PREFIX}{module}"
    if weight not in model.index:
        return [f"{full}.{ending}: {unknown(weight, model.index)}" for ending in parts]
    kind = model.kind(weight)
    if not kind or model.has_experts(weight):
        return [
            f"{full}.{ending}: {weight} is not in a module that can have LoRA factors"
            for ending in parts
        ]
    problems = []
    if tensor_names.ROWS in parts:
        problems += _add_rows(found, module, parts.pop(tensor_names.ROWS), config, model)
        if not parts:
            return problems
    problems += _check_factors(full, parts, config, kind, model.shape(weight), module)
    if problems:
        return problems
    added = parts.pop(tensor_names.LORA_BIAS, None)
    factors = tensor_names.to_factors(kind, parts, config.scale(module))
    found.factors[weight] = factors
    if added is not None:
        if f"{module}.bias" not in model.index:
            return [f"{full}.{tensor_names.LORA_BIAS}: the base has no {module}.bias to add it to"]
        found.added[f"{module}.bias"] = added.astype("float64") * factors.scale
    return []


def _check_factors(
    full: str,
    parts: Mapping[str, np.ndarray],
    config: PeftConfig,
    kind: str,
    shape: tuple[int, ...],
    module: str,
) -> list[str]:
    rank = config.rank(module)
    wanted = tensor_names.shapes(kind, shape, rank)
    needed = [*tensor_names.endings(kind), *([tensor_names.MAGNITUDE] if config.use_dora else [])]
    allowed = [*needed, *([tensor_names.LORA_BIAS] if config.lora_bias else [])]
    problems = [f"{full}.{ending}: missing, {wanted[ending]}" for ending in needed]
    problems = [line for line, ending in zip(problems, needed, strict=True) if ending not in parts]
    for ending, tensor in parts.items():
        if ending not in allowed:
            problems.append(f"{full}.{ending}: unexpected for a module of kind {kind}")
        elif tensor.shape != wanted[ending]:
            line = _shape_problem(f"{full}.{ending}", tensor.shape, wanted[ending])
            problems.append(f"{line} at rank {rank}")
    return problems


def _add_rows(
    found: Contents, module: str, values: np.ndarray, config: PeftConfig, model: TorchBase
) -> list[str]:
    name, weight = f"{tensor_names.PREFIX}{module}.{tensor_names.ROWS}", f"{module}.weight"
    numbers = config.rows(module)
    if numbers is None:
        return [f"{name}: trainable_token_indices does not say which rows these are"]
    shape, kind = model.shape(weight), model.kind(weight)
    problems = []
    if kind not in ("embedding", "linear"):
        problems.append(f"{name}: {weight} is not an embedding")
    elif values.shape != (len(numbers), shape[1]):
        problems.append(_shape_problem(name, values.shape, (len(numbers), shape[1])))
    elif len(set(numbers)) < len(numbers) or max(numbers, default=-1) >= shape[0]:
        problems.append(f"{name}: trainable_token_indices has duplicates, or rows >= {shape[0]}")
    else:
        found.rows[weight] = numbers, values
    return problems


def _missing(by_module: Mapping[str, Any], config: PeftConfig, model: TorchBase) -> list[str]:
    """List modules that the configuration targets, but the file lacks."""
    targeted = [name.removesuffix(".weight") for name in model.adaptable()]
    return [
        f"{tensor_names.PREFIX}{module}.{tensor_names.endings(model.kind(module + '.weight'))[0]}: "
        "missing, but target_modules names the module"
        for module in targeted
        if module not in by_module and config.target_modules != "all-linear"
        if config.targets(module)
    ]
