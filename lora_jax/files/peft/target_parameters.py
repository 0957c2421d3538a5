"""Parameters that PEFT adapts by `target_parameters`: which they are, and their names in a file.

Each wraps its PyTorch module once more; the module's first parameter is innermost. So with k
adapted parameters in a module, the names of the i-th have k - 1 - i times "base_layer.".
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from lora_jax.files.peft import tensor_names
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.experts import Experts

_A, _B = tensor_names.endings("experts")


def wrapper_names(names: Iterable[str], model: TorchBase) -> dict[str, str]:
    """Return the name in a file of each parameter's wrapper: "h.0.experts.base_layer".

    Args:
      names: all parameters that are adapted.
      model: the rows of its naming give their order within a module.
    """
    by_module: dict[str, list[str]] = {}
    for name in sorted(names, key=model.row):
        by_module.setdefault(module_of(name), []).append(name)
    return {
        name: module + ".base_layer" * (len(inside) - 1 - i)
        for module, inside in by_module.items()
        for i, name in enumerate(inside)
    }


def find_targets(config: PeftConfig, model: TorchBase) -> tuple[list[str], list[str]]:
    """Return the experts' parameters that a configuration adapts, and its unknown entries."""
    found = [name for name in model.experts() if config.targets_parameter(name)]
    problems = []
    for entry in config.target_parameters or ():
        if not any(name == entry or name.endswith("." + entry) for name in found):
            problems.append(
                f"target_parameters: {entry!r} is not a known parameter of experts; add to the "
                'naming a row Entry(its PyTorch name, path, "experts" or "experts_transposed")'
            )
    return found, problems


def take(
    found: Contents,
    tensors: Mapping[str, dict[str, np.ndarray]],
    config: PeftConfig,
    model: TorchBase,
) -> tuple[list[str], list[str]]:
    """Add the parameters' factors to `found`.

    Args:
      tensors: a file's tensors by module and ending.

    Returns:
      The modules of these tensors in the file, and the problems.
    """
    names, problems = find_targets(config, model)
    places = wrapper_names(names, model)
    for name, module in places.items():
        parts = tensors.get(module, {})
        wrong = _problems(name, f"{tensor_names.PREFIX}{module}", parts, config, model)
        problems += wrong
        if not wrong:
            rank, scale = config.rank(name), config.scale(name)
            found.experts[name] = Experts.from_tensors(parts[_A], parts[_B], rank, scale)
    return list(places.values()), problems


def _problems(
    name: str, full: str, parts: Mapping[str, np.ndarray], config: PeftConfig, model: TorchBase
) -> list[str]:
    count, (out, ins), rank = model.count(name), model.sides(name), config.rank(name)
    wanted = {_A: (count * rank, ins), _B: (out, rank * count)}
    problems = [
        f"{full}.{ending}: missing, {shape} for {name}, which target_parameters names"
        for ending, shape in wanted.items()
        if ending not in parts
    ]
    for ending, tensor in parts.items():
        if ending not in wanted:
            problems.append(f"{full}.{ending}: unexpected for {name}, a parameter of experts")
        elif tensor.shape != wanted[ending]:
            problems.append(
                f"{full}.{ending}: has shape {tensor.shape}, needs {wanted[ending]} at rank {rank} "
                f"for the {count} experts of {name}"
            )
    return problems


def to_tensors(contents: Contents, model: TorchBase) -> dict[str, np.ndarray]:
    """Return the parameters' factors under PEFT's names and in its shapes."""
    tensors: dict[str, np.ndarray] = {}
    for name, module in wrapper_names(contents.experts, model).items():
        a, b = contents.experts[name].tensors()
        tensors |= {
            f"{tensor_names.PREFIX}{module}.{_A}": a,
            f"{tensor_names.PREFIX}{module}.{_B}": b,
        }
    return tensors


def find_unwritable(contents: Contents, model: TorchBase) -> list[str]:
    """List what PEFT does not support in one adapter with parameters of experts."""
    if not contents.experts:
        return []
    which = ", ".join(sorted(contents.experts))
    problems = []
    for name, factors in contents.factors.items():
        if factors.magnitude is not None:
            problems.append(
                f"{name}: PEFT does not support DoRA beside experts' parameters ({which})"
            )
        if model.kind(name) == "conv1d":
            problems.append(
                f"{name}: PEFT does not support Conv1D beside experts' parameters ({which})"
            )
        if any(module_of(name) == module_of(other) for other in contents.experts):
            problems.append(f"{name}: PEFT cannot adapt both a module and its parameters ({which})")
    return problems


def shortest_names(
    adapted: Collection[str], every: Collection[str], complete: bool
) -> tuple[str, ...]:
    """Return `target_parameters` for these names: ends of names if these select no others.

    >>> shortest_names(["h.0.x.up", "h.1.x.up"], ["h.0.x.up", "h.1.x.up", "h.1.x.down"], True)
    ('x.up',)
    """
    ends = {".".join(name.split(".")[-2:]) for name in adapted}
    short = tuple(sorted(ends))
    selected = {name for name in every if name.endswith(tuple("." + end for end in ends))}
    return short if complete and selected == set(adapted) else tuple(sorted(adapted))
