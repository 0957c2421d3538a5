"""Read adapters of loralib, the package of the LoRA paper, from a safetensors file."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.split import base_of
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Naming
from lora_jax.files.torch_adapters.contents import (
    Contents,
    TorchBase,
    dtype_problem,
)
from lora_jax.files.torch_adapters.factors import TorchFactors, join_factors
from lora_jax.files.torch_adapters.rename import describe, find_rules, renamed
from lora_jax.files.torch_adapters.to_tree import fit_to_base

__all__ = ["load"]

_ENDINGS = ("lora_A", "lora_B")


def load(
    path: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    alpha: float,
    enabled: Mapping[str, Sequence[bool]] | None = None,
    strict: bool = True,
    dtype: Any = None,
    dropout: float = 0.0,
    rename: Mapping[str, str] | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> Any:
    """Load the adapters in loralib's `lora_state_dict` as an overlay of `base`.

    The file contains neither α, nor the dropout, nor which outputs of a `MergedLinear` are adapted,
    so these are arguments. The scale is α/r. A `MergedLinear` (GPT-2's fused q, k, v) with k of its
    n parts enabled keeps A `[r·k, in]` and B `[k·out/n, r]`, one block per part
    (https://github.com/microsoft/LoRA/blob/main/loralib/layers.py); here B is block-diagonal with
    rank r·k. A convolution with kernel k × k has low rank in another shape of the weight, A
    `[r·k, in·k]` and B `[out·k, r·k]`; here the same update has rank r·k². Grouped convolutions
    are rejected. Biases become fully trained leaves. `torch.save` writes pickles, which are never
    read; save the dictionary with `safetensors.torch.save_file`.

    Args:
      path: a safetensors file with names like "h.0.attn.c_attn.lora_A".
      base, naming, strict, dtype, rename, fsdp: as for `lora_jax.peft.load`.
      alpha: loralib's `lora_alpha`.
      dropout: loralib's `lora_dropout`, for `with_dropout`.
      enabled: the `enable_lora` of each `MergedLinear`, by the end of the module's name:
        {"c_attn": [True, False, True]}. By default all outputs are adapted.

    Raises:
      ConfigError: `alpha` is not a finite number, `dropout` is not a probability, or `enabled` is
        not a mapping to flags.
      AdapterFileError: the file is missing or damaged, or its tensors do not fit the base; all
        problems are listed at once.

    >>> import tempfile, jax.numpy as jnp
    >>> from lora_jax.files.naming import Entry
    >>> base = {"c_attn": {"kernel": jnp.ones((4, 6))}}
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "conv1d"),))
    >>> tensors = {"c_attn.lora_A": np.eye(4, dtype="f4"), "c_attn.lora_B": np.ones((4, 2), "f4")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors_file.write(f"{folder}/lora.safetensors", tensors)
    ...     adapters = load(f"{folder}/lora.safetensors", base, naming, alpha=2,
    ...                     enabled={"c_attn": [True, False, True]})
    >>> adapters["c_attn"]["kernel"].a.shape, adapters["c_attn"]["kernel"].b[:, 0]
    ((4, 4), Array([1., 1., 0., 0.], dtype=float32))
    """
    if alpha is None:
        raise ConfigError("alpha must be a number: loralib's files do not contain it")
    LoraConfig(alpha=alpha)  # raises if it is not a number
    parts = _check_enabled(enabled or {})
    base = base_of(base)
    tensors, _ = safetensors_file.read(path, finite=True)
    model = TorchBase(base, naming)
    if rename:
        tensors = _rename(tensors, rename)
    read = lambda tensors: _read_contents(tensors, float(alpha), parts, model)
    contents, problems = read(tensors)
    rules = find_rules(list(tensors), lambda name: _weight(name, model), model.index)
    if rules:
        problems = [describe(rules, tensors), *read(_rename(tensors, rules))[1]]
    options: dict[str, Any] = {"strict": strict, "dtype": dtype, "dropout": dropout}
    return fit_to_base(path, contents, problems, model, **options, fsdp=fsdp)


def _rename(tensors: Mapping[str, np.ndarray], parts: Mapping[str, str]) -> dict[str, np.ndarray]:
    new = renamed(tensors, parts)
    return {new[name]: tensor for name, tensor in tensors.items()}


def _weight(name: str, model: TorchBase) -> str:
    """Return the tensor of the base that a name in a file is about."""
    module, _, ending = name.rpartition(".")
    return _known(f"{module}.conv.weight" if ending in _ENDINGS else name, model)


def _check_enabled(enabled: Any) -> dict[str, tuple[bool, ...]]:
    if isinstance(enabled, Mapping) and all(
        isinstance(flags, Sequence) and set(flags) <= {True, False} and any(flags)
        for flags in enabled.values()
    ):
        return {name: tuple(map(bool, flags)) for name, flags in enabled.items()}
    raise ConfigError(f"enabled must map module names to lists of flags, got {enabled!r}")


def _read_contents(
    tensors: Mapping[str, np.ndarray],
    alpha: float,
    enabled: Mapping[str, tuple[bool, ...]],
    model: TorchBase,
) -> tuple[Contents, list[str]]:
    found, problems = Contents(), []
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for full, tensor in tensors.items():
        name = _known(full, model)
        module, _, ending = name.rpartition(".")
        problem = dtype_problem(tensor)
        if problem:
            problems.append(f"{full}: {problem}")
        elif ending in _ENDINGS:
            by_module.setdefault(module, {})[ending] = tensor
        elif name not in model.index or ending != "bias":
            problems.append(f"{full}: {model.unknown(name)}")
        elif tensor.shape != model.shape(name):
            problems.append(f"{full}: has shape {tensor.shape}, needs {model.shape(name)}")
        else:
            found.whole[name] = tensor
    for module, arrays in by_module.items():
        weight = _known(f"{module}.conv.weight", model)
        flags = next((x for name, x in enabled.items() if _ends(module, name)), (True,))
        if weight not in model.index:
            problems.append(f"{module}: {model.unknown(weight)}")
            continue
        factors = _factors(arrays, alpha, flags, model, weight)
        if isinstance(factors, str):
            problems.append(f"{module}: {factors}")
        else:
            found.factors[weight] = factors
    unused = [name for name in enabled if not any(_ends(m, name) for m in by_module)]
    problems += [f"enabled: no module in the file ends with {name!r}" for name in unused]
    return found, problems


def _known(name: str, model: TorchBase) -> str:
    """Return the name that the tensor has in the model, which may lack loralib's "conv".

    loralib's convolution "c" keeps its factors in "c", and weight and bias in "c.conv".
    """
    return name if name in model.index else re.sub(r"\.conv(\.weight|\.bias)$", r"\1", name)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _factors(
    arrays: Mapping[str, np.ndarray],
    alpha: float,
    flags: tuple[bool, ...],
    model: TorchBase,
    weight: str,
) -> TorchFactors | str:
    """Return the factors of one module, or what is wrong with its tensors."""
    kind, shape, outputs = model.kind(weight), model.shape(weight), model.outputs(weight)
    missing = [ending for ending in _ENDINGS if ending not in arrays]
    if missing:
        return f"{', '.join(missing)} missing"
    a, b = (arrays[ending] for ending in _ENDINGS)
    if kind == "conv":
        return _convolution_factors(a, b, alpha, shape)
    if kind not in ("linear", "conv1d", "embedding"):
        return "is not a linear layer, embedding or convolution"
    ins = shape[1] if kind == "linear" else shape[0]
    count, rank = sum(flags), b.shape[-1] if b.ndim else 0
    needed = (count * rank, ins), (outputs // len(flags) * count, rank)
    if not rank or outputs % len(flags) or (a.shape, b.shape) != needed:
        return (
            f"lora_A {a.shape} and lora_B {b.shape} do not fit the weight {shape} with "
            f"{count} of {len(flags)} parts adapted; check enabled="
        )
    blocks = zip(np.split(a, count), np.split(b, count), strict=True)
    parts = [TorchFactors(*next(blocks), alpha / rank) if flag else None for flag in flags]
    joined = join_factors(parts, [outputs // len(flags)] * len(flags))
    assert joined is not None
    return joined


def _convolution_factors(
    a: np.ndarray, b: np.ndarray, alpha: float, shape: tuple[int, ...]
) -> TorchFactors | str:
    """Return the factors of loralib's ΔW = (B·A), read as `[out, in, k, k]`, or why there are none.

    The in·k² numbers of one output are k rows of B·A: the same A on k parts of the input, each with
    its own row of B.
    """
    out, ins, *kernel = shape
    k, rows = kernel[0], len(a) if a.ndim else 0
    wanted = (rows, ins * k), (out * k, rows)
    square = set(kernel) == {k} and math.prod(kernel) == k * k
    if not square or not rows or rows % k or (a.shape, b.shape) != wanted:
        return (
            f"lora_A {a.shape} and lora_B {b.shape} do not fit the convolution {shape}; if it is "
            "grouped, merge it with loralib (model.eval()) and use the weights as a new base"
        )
    blocks = np.kron(np.eye(k, dtype=a.dtype), a)
    return TorchFactors(
        blocks.reshape(k * rows, ins, *kernel), b.reshape(out, k * rows), alpha / (rows // k)
    )
