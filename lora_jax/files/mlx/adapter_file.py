"""The two files of an mlx-lm adapter: their names, keys and tensors, read without a base."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.checks import is_number
from lora_jax.core.errors import AdapterFileError
from lora_jax.files.disk import safetensors_file, strict_json
from lora_jax.files.disk.required_files import read_required
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.file_contents import (
    FileContents,
    ImpliedWeight,
    factor_problem,
    missing_factor,
    weight_shape,
)
from lora_jax.files.torch_adapters.rename import renamed

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
#: The endings of a module's tensors.
A, B, MAGNITUDE = "lora_a", "lora_b", "m"
_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte)")  # what mlx-lm's models call it


@dataclasses.dataclass(frozen=True)
class MlxFile:
    """An adapter directory of mlx-lm, parsed."""

    source: Path  # of the tensors
    tensors: dict[str, np.ndarray]
    scale: float
    use_dora: bool
    dropout: float
    base_model: str | None

    def rename(self, parts: Mapping[str, str]) -> "MlxFile":
        """Return the file with other names of tensors, see `rename`."""
        new = renamed(self.tensors, parts)
        tensors = {new[name]: x for name, x in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def modules(self) -> dict[str, dict[str, np.ndarray]]:
        """Group the tensors that make an adapter by module and ending."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in self.tensors.items():
            module, _, ending = name.rpartition(".")
            if module and ending in (A, B, MAGNITUDE):
                found.setdefault(module, {})[ending] = tensor
        return found

    def contents(self) -> FileContents:
        """Return what the file contains, without a base."""
        factors: dict[str, TorchFactors | Experts] = {}
        weights: dict[str, ImpliedWeight] = {}
        problems: dict[str, str] = {}
        factor = (f".{A}", f".{B}")
        others = {n: x.shape for n, x in self.tensors.items() if not n.endswith(factor)}
        for module, fields in self.modules().items():
            if A not in fields and B not in fields:
                continue
            problem = missing_factor(fields, A, B) or factor_problem(fields, (A, B))
            found = problem or _factors(fields, self.scale)
            if isinstance(found, str):
                problems[module] = found
                continue
            factors[module] = found
            if isinstance(found, TorchFactors):
                kind = "embedding" if _EMBEDDING.fullmatch(module) else "linear"
                weights[f"{module}.weight"] = kind, weight_shape(kind, found)
        return FileContents(
            variant="DoRA" if self.use_dora else "LoRA",
            base_model=self.base_model,
            use_rslora=False,
            factors=factors,
            others=others,
            weights=weights,
            problems=problems,
        )


def _factors(fields: Mapping[str, np.ndarray], scale: float) -> TorchFactors | Experts | str:
    """Return a module's factors, or what is wrong with their shapes."""
    a, b = fields[A], fields[B]
    if a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] > 0:
        return to_factors(fields, scale)
    if a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[1] == b.shape[2] > 0:
        return Experts(a, b, scale)  # [experts, rank, in] and [experts, out, rank]
    return f"shapes {a.shape} and {b.shape} are not A [in, rank] and B [rank, out]"


def to_factors(
    fields: Mapping[str, np.ndarray], scale: float, *, rows_are_outputs: bool = False
) -> TorchFactors:
    """Return the factors of a module's tensors: A `[in, rank]` and B `[rank, out]`.

    Args:
      fields: the tensors by ending.
      scale: the file's.
      rows_are_outputs: whether this is an embedding, A `[rows, rank]`, whose rows are the outputs.
    """
    a, b = fields[A].T, fields[B].T
    if rows_are_outputs:
        a, b = b.T, a.T
    return TorchFactors(a, b, scale, fields.get(MAGNITUDE))


def to_tensors(
    module: str, factors: TorchFactors, *, rows_are_outputs: bool = False
) -> dict[str, np.ndarray]:
    """Return a module's factors under mlx-lm's names and in its shapes."""
    a, b = (factors.b, factors.a) if rows_are_outputs else (factors.a.T, factors.b.T)
    arrays = {A: a, B: b, MAGNITUDE: factors.magnitude}
    return {f"{module}.{ending}": x for ending, x in arrays.items() if x is not None}


def is_config(values: Mapping[str, Any]) -> bool:
    """Return whether the values of an `adapter_config.json` are mlx-lm's."""
    return "lora_parameters" in values or "fine_tune_type" in values


def read_file(directory: str | os.PathLike, *, finite: bool = True) -> MlxFile:
    """Read an adapter directory of mlx-lm.

    Args:
      directory: with `adapter_config.json` and `adapters.safetensors`.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: a file is missing or damaged.
    """
    files = read_required(directory, [CONFIG, TENSORS])
    path, source = Path(directory) / CONFIG, Path(directory) / TENSORS
    values = strict_json.parse_json(files[CONFIG], str(path))
    values = values if isinstance(values, dict) else {}
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterFileError(f"{path}: fine_tune_type must be lora or dora, got {kind!r}")
    parameters = values.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale) or not abs(scale) < 1e30:
        raise AdapterFileError(f"{path}: lora_parameters.scale must be a number, got {scale!r}")
    dropout = parameters.get("dropout", 0.0) if isinstance(parameters, dict) else 0.0
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterFileError(
            f"{path}: lora_parameters.dropout must be a rate of at least 0 and below 1, got "
            f"{strict_json.show(dropout)}"
        )
    base_model = values.get("model")
    return MlxFile(
        source,
        safetensors_file.decode(files[TENSORS], str(source), finite=finite)[0],
        float(scale),
        kind == "dora",
        float(dropout),
        base_model if isinstance(base_model, str) else None,
    )


def config(
    *,
    scale: float,
    rank: int,
    use_dora: bool,
    dropout: float,
    keys: list[str],
    base_model: str | None,
) -> dict[str, Any]:
    """Return the values of an `adapter_config.json`.

    Args:
      scale: one for all modules, as the rank.
      rank: of all factors.
      use_dora: whether they have magnitudes.
      dropout: the rate in training.
      keys: the names of the adapted modules within their layers.
      base_model: the name or path of the base model.
    """
    return {
        "fine_tune_type": "dora" if use_dora else "lora",
        "num_layers": -1,  # all layers: where nothing was adapted, the update is zero
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
        **({} if base_model is None else {"model": base_model}),
    }
