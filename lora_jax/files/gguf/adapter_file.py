"""A GGUF file of an adapter: its keys and tensors, read without a base."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.disk import gguf_file, gguf_schema
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.file_contents import (
    FileContents,
    ImpliedWeight,
    factor_problem,
    missing_factor,
    weight_shape,
)

#: The endings of a weight's factors: "blk.0.attn_q.weight.lora_a".
A, B = "lora_a", "lora_b"
ALPHA, BASE_NAME = "adapter.lora.alpha", "general.base_model.0.name"
_EMBEDDING = "token_embd.weight"  # whose A llama.cpp keeps as [tokens, rank]
_INVOCATION = "adapter.alora.invocation_tokens"


@dataclasses.dataclass(frozen=True)
class GgufAdapter:
    """An adapter in a GGUF file, parsed."""

    source: Path
    architecture: str
    alpha: float
    tensors: dict[str, np.ndarray]
    base_model: str | None

    def weights(self) -> dict[str, dict[str, np.ndarray]]:
        """Group the factors by the name of their weight, and by ending."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in self.tensors.items():
            weight, _, ending = name.rpartition(".")
            if weight and ending in (A, B):
                found.setdefault(weight, {})[ending] = tensor
        return found

    def others(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are not factors; llama.cpp ignores norms."""
        factors = {f"{weight}.{ending}" for weight, own in self.weights().items() for ending in own}
        return {name: x.shape for name, x in self.tensors.items() if name not in factors}

    def factors(
        self, weight: str, fields: Mapping[str, np.ndarray]
    ) -> TorchFactors | Experts | str:
        """Return a weight's factors, or why its tensors are none.

        As in llama.cpp, the scale is alpha over the rank of each weight, and 1 if alpha is 0.
        """
        problem = missing_factor(fields, A, B) or factor_problem(fields, (A, B))
        if problem:
            return problem
        a, b = fields[A], fields[B]
        a = a.T if is_embedding(weight) else a
        scale = self.alpha / b.shape[-1] if self.alpha else 1.0
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            return TorchFactors(a, b, scale)
        if a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[1] == b.shape[2]:
            return Experts(a, b, scale)
        wanted = "[tokens, rank]" if is_embedding(weight) else "[rank, in]"
        return f"shapes {fields[A].shape} and {b.shape} are not A {wanted} and B [out, rank]"

    def contents(self) -> FileContents:
        """Return what the file contains, without a base."""
        factors: dict[str, TorchFactors | Experts] = {}
        weights: dict[str, ImpliedWeight] = {}
        problems: dict[str, str] = {}
        for weight, fields in self.weights().items():
            found = self.factors(weight, fields)
            module = weight.removesuffix(".weight")
            if isinstance(found, str):
                problems[module] = found
                continue
            factors[module] = found
            if isinstance(found, TorchFactors):
                kind = "embedding" if is_embedding(weight) else "linear"
                weights[weight] = kind, weight_shape(kind, found)
        return FileContents(
            variant="LoRA",
            base_model=self.base_model,
            use_rslora=False,
            factors=factors,
            others=self.others(),
            weights=weights,
            problems=problems,
        )


def is_embedding(weight: str) -> bool:
    """Return whether llama.cpp looks up rows of this weight, and keeps its A transposed."""
    return weight == _EMBEDDING


def is_adapter(metadata: Mapping[str, Any]) -> bool:
    """Return whether the metadata of a GGUF file are those of an adapter, not of a model."""
    return metadata.get("general.type") == "adapter" or "adapter.type" in metadata


def read_file(path: str | os.PathLike, *, finite: bool = True) -> GgufAdapter:
    """Read an adapter from a GGUF file.

    Args:
      path: the file.
      finite: reject NaN and infinite values.

    Raises:
      AdapterFileError: it is damaged, or contains a model or another kind of adapter.
      FileNotFoundError: it does not exist.
    """
    path = Path(path)
    try:
        file = gguf_file.read(path)
        gguf_schema.check(file.metadata, gguf_schema.ADAPTER)
        tensors = {name: _numbers(x, finite) for name, x in file.tensors.items()}
    except ModelFileError as error:
        message = str(error)
        start = "" if message.startswith(str(path)) else f"{path}: "
        raise AdapterFileError(f"{start}{message}") from error
    problem = _problem(file.metadata)
    if problem:
        raise AdapterFileError(f"{path}: {problem}")
    return GgufAdapter(
        path,
        file.metadata["general.architecture"],
        float(file.metadata.get(ALPHA, 0.0)),
        tensors,
        file.metadata.get(BASE_NAME),
    )


def _problem(metadata: Mapping[str, Any]) -> str | None:
    """Return why a GGUF file is not a LoRA adapter that can be read, or None."""
    if not is_adapter(metadata):
        return "a GGUF model, not an adapter: general.type is not 'adapter'"
    if metadata.get("general.type") != "adapter":
        return f"general.type is {shown_value(metadata.get('general.type'))}, not 'adapter'"
    if metadata.get("adapter.type") != "lora":
        return f"adapter.type is {shown_value(metadata.get('adapter.type'))}, not 'lora'"
    if "general.architecture" not in metadata:
        return "general.architecture, the architecture of its model, is missing"
    if _INVOCATION in metadata:
        return "an aLoRA adapter, which acts only after certain tokens, is not supported"
    return None


def _numbers(tensor: gguf_file.GgufTensor, finite: bool) -> np.ndarray:
    """Read a tensor in the dtype that it has in the file; quantized ones as float32."""
    if tensor.is_quantized or tensor.kind == "F64" or finite:
        return np.asarray(tensor).astype(tensor.stored_dtype)
    return np.frombuffer(tensor.stored.tobytes(), tensor.stored_dtype).reshape(tensor.shape)
