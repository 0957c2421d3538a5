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
)
from lora_jax.files.torch_adapters.vocabulary import OtherVocabulary


def read_contents(file: PeftFile, model: TorchBase) -> tuple[Contents, list[str]]:
    """Return what fits the base, and what is wrong with the rest."""
    config = file.rules
    tied = tied_head.find(model)
    tensors, problems, are_copies = file.tensors, list[str](), config.ensure_weight_tying
    if tied is not None:
        tensors, problems = tied_head.drop_copies(tensors, tied)
        are_copies |= len(tensors) < len(file.tensors)
    vocabulary = OtherVocabulary(model)
    found = Contents(dropout=float(config.lora_dropout))
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        part = tensor_names.part_of_name(name, tensors, model.index)
        if part is None:
            problems.append(f"{name}: unexpected: PEFT's names start with {tensor_names.PREFIX}")
        elif dtype_problem(tensor):
            problems.append(f"{name}: {dtype_problem(tensor)}")
        elif part.field and part.field != tensor_names.ORIGINAL:
            by_module.setdefault(part.module, {})[part.field] = tensor
        elif part.module not in model.index:
            problems.append(f"{name}: {model.unknown(part.module)}")
        elif tensor.shape != model.shape(part.module):
            got, wanted = tensor.shape, model.shape(part.module)
            if not vocabulary.explains(part.module, got, wanted):
                problems.append(_shape_problem(name, got, wanted))
        elif part.field:
            if not tensor_names.is_beside_trained(name):
                found.untrained[part.module] = tensor
        elif not np.array_equal(found.whole.setdefault(part.module, tensor), tensor):
            problems.append(f"{name}: differs from the file's other copy of {part.module}")
    wrapped, wrong = target_parameters.take(found, by_module, config, model)
    problems += wrong
    by_module = {module: x for module, x in by_module.items() if module not in wrapped}
    for module, parts in by_module.items():
        problems += _add(found, module, parts, config, model, vocabulary)
    problems += vocabulary.problems()
    problems += _missing(by_module, config, model)
    if tied is not None and not are_copies:
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
    vocabulary: OtherVocabulary,
) -> list[str]:
    """Add one module's tensors to `found`, or return what is wrong with them."""
    weight, full = f"{module}.weight", f"{tensor_names.PREFIX}{module}"
    if weight not in model.index:
        return [f"{full}.{ending}: {model.unknown(weight)}" for ending in parts]
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
    problems += _check_factors(full, parts, config, model, vocabulary)
    if problems or not parts:
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
    parts: dict[str, np.ndarray],
    config: PeftConfig,
    model: TorchBase,
    vocabulary: OtherVocabulary,
) -> list[str]:
    """Return what is wrong with one module's tensors; empty `parts` if that is the vocabulary."""
    module = full.removeprefix(tensor_names.PREFIX)
    weight, rank = f"{module}.weight", config.rank(module)
    kind = model.kind(weight)
    wanted = tensor_names.shapes(kind, model.shape(weight), rank)
    needed = [*tensor_names.endings(kind), *([tensor_names.MAGNITUDE] if config.use_dora else [])]
    allowed = [*needed, *([tensor_names.LORA_BIAS] if config.lora_bias else [])]
    problems = [f"{full}.{ending}: missing, {wanted[ending]}" for ending in needed]
    problems = [line for line, ending in zip(problems, needed, strict=True) if ending not in parts]
    misfits: list[str] = []
    for ending, tensor in parts.items():
        if ending not in allowed:
            problems.append(f"{full}.{ending}: unexpected for a module of kind {kind}")
        elif tensor.shape != wanted[ending]:
            if vocabulary.explains(weight, tensor.shape, wanted[ending]):
                misfits.append(ending)
                continue
            line = _shape_problem(f"{full}.{ending}", tensor.shape, wanted[ending])
            problems.append(f"{line} at rank {rank}")
    if misfits:
        parts.clear()
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
    """List modules that the configuration targets, in every PEFT's reading, but the file lacks."""
    if config.target_modules == "all-linear":
        return []
    adaptable = [name.removesuffix(".weight") for name in model.adaptable()]
    lacking = [module for module in adaptable if module not in by_module]
    missing, older = (
        [module for module in lacking if config.targets(module, last_number=last)]
        for last in (False, True)
    )
    return [
        f"{tensor_names.PREFIX}{module}.{tensor_names.endings(model.kind(module + '.weight'))[0]}: "
        "missing, but target_modules names the module"
        for module in (missing if older else [])
    ]
