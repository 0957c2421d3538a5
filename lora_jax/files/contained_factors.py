"""The factors in an adapter file of any kind, without the base: what `inspect` shows."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.weights import LoraWeight, check_fits
from lora_jax.files import diffusion, gguf, kinds, mlx, native, peft
from lora_jax.files.disk import strict_json
from lora_jax.files.peft.wrong_names import rules_of_format
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.file_contents import FileContents


@dataclasses.dataclass(frozen=True)
class ShownFactors:
    """The update `scale · A · B` of one matrix; each layer of a stack, and each expert, has one."""

    module: str
    a: np.ndarray  # [in, rank]
    b: np.ndarray  # [rank, out]
    scale: float
    alpha: float


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter file contains."""

    kind: str
    path: Path
    base: str | None  # the name of the model that it was made for
    variant: str  # "LoRA", "rsLoRA", "DoRA", ...
    factors: list[ShownFactors]
    whole: dict[str, tuple[int, ...]]  # other trained tensors: biases, heads, rows, magnitudes
    dtypes: list[str]
    parameters: int

    @property
    def targets(self) -> list[str]:
        """The last names of the modules that have factors: "q_proj", "v_proj"."""
        names = (re.sub(r"(\[\d+\])+$", "", one.module) for one in self.factors)
        names = (re.sub(r"[/.](kernel|embedding)$", "", name) for name in names)
        return sorted({re.split(r"[/.]", name)[-1] for name in names})


def read_factors(path: Path) -> AdapterFile:
    """Read an adapter of any kind, see `kinds.adapter`; NaN and infinite values are kept.

    Raises:
      AdapterFileError: it is damaged; all problems are listed.
    """
    found = kinds.adapter(path)
    if found.kind == kinds.NATIVE:
        return _from_native(found.path)
    if found.kind == kinds.PIPELINE:
        each = ", ".join(str(found.path / name) for name in kinds.components_in(found.path))
        raise AdapterFileError(f"{found.path}: adapters of several components; give one of {each}")
    file: peft.PeftFile | mlx.MlxFile | gguf.GgufAdapter | diffusion.DiffusionFile
    if found.kind == kinds.MLX:
        file = mlx.read_file(found.path, finite=False)
    elif found.kind in kinds.OF_IMAGES:
        file = diffusion.read_file(found.path, finite=False)
    elif found.kind == kinds.GGUF_ADAPTER:
        file = gguf.read_file(found.path, finite=False)
    else:
        file = peft.read_file(found.path, finite=False)
        file = file.rename(rules_of_format(file.tensors))
    contents = file.contents().require_whole(found.path)
    return AdapterFile(
        kind=found.kind,
        path=found.path,
        base=contents.base_model,
        variant=contents.variant,
        factors=_sort(_from_torch(contents)),
        whole=dict(contents.others),
        **_sizes(file.tensors.values()),
    )


def _from_torch(contents: FileContents) -> Iterator[ShownFactors]:
    for module, found in contents.factors.items():
        if isinstance(found, Experts):
            experts = [(f"{module}[{e}]", found.of(e)) for e in range(len(found.a))]
        else:
            experts = [(module, found)]
        for name, one in experts:
            yield _show(name, one, contents.use_rslora)


def _show(module: str, one: TorchFactors, use_rslora: bool) -> ShownFactors:
    alpha = _alpha(one.scale, one.rank, use_rslora)
    return ShownFactors(module, one.a.reshape(one.rank, -1).T, one.b.T, one.scale, alpha)


def _from_native(path: Path) -> AdapterFile:
    file = native.read_file(path, finite=False)
    lora = {name: node for name, node in file.nodes.items() if isinstance(node, LoraWeight)}
    problems = list(file.problems)
    for name, node in lora.items():  # without a base, A and B are checked against each other
        problems += check_fits(name, node, jax.ShapeDtypeStruct(node.shape, node.a.dtype))
    if problems:
        raise AdapterFileError(f"{path}: the adapter is damaged:\n" + strict_json.lines(problems))
    others: dict[str, np.ndarray] = {}
    for name, adapted in file.nodes.items():
        if not isinstance(adapted, LoraWeight):
            others[name] = adapted.value
        elif adapted.magnitude is not None:
            others[f"{name}.magnitude"] = adapted.magnitude
    variant = "rsLoRA" if file.use_rslora else "LoRA"
    has_dora = any(node.magnitude is not None for node in lora.values())
    factors = [x for node in lora.values() for x in (node.a, node.b)]
    return AdapterFile(
        kind=kinds.NATIVE,
        path=path,
        base=file.base_model,
        variant=f"{variant}, DoRA" if has_dora else variant,
        factors=_sort(x for n, node in lora.items() for x in _layers(n, node, file.use_rslora)),
        whole={name: x.shape for name, x in others.items()},
        **_sizes([*factors, *others.values()]),
    )


def _layers(module: str, node: LoraWeight, use_rslora: bool) -> Iterator[ShownFactors]:
    """Yield one matrix per index of the batch axes, which are those of `scale`."""
    for index in np.ndindex(*node.scale.shape):
        name = module + "".join(f"[{i}]" for i in index)
        a, b = node.a[index].reshape(-1, node.rank), node.b[index].reshape(node.rank, -1)
        scale = float(node.scale[index])
        yield ShownFactors(name, a, b, scale, _alpha(scale, node.rank, use_rslora))


def _alpha(scale: float, rank: int, use_rslora: bool) -> float:
    return scale * (math.sqrt(rank) if use_rslora else rank)


def _sort(factors: Iterable[ShownFactors]) -> list[ShownFactors]:
    """Sort by name, layer 2 before layer 10."""

    def key(factor: ShownFactors) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", factor.module)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return sorted(factors, key=key)


def _sizes(tensors: Iterable[np.ndarray]) -> dict[str, Any]:
    tensors = list(tensors)
    return {
        "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
        "parameters": sum(tensor.size for tensor in tensors),
    }
