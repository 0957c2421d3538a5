"""Write adapters as a GGUF file."""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import StructureError
from lora_jax.files.disk import gguf_writer, processes
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.files.gguf.adapter_file import ALPHA, BASE_NAME, A, B, is_embedding
from lora_jax.files.gguf.names import Names
from lora_jax.files.torch_adapters.contents import Contents, TorchBase
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.from_tree import check, collect, find_unloadable

_KINDS = ("linear", "embedding", "experts", "experts_transposed")


def save(
    path: str | os.PathLike,
    adapters: Any,
    names: Names,
    *,
    base: Any = None,
    base_model: str | None = None,
) -> None:
    """Write adapters as a GGUF file, which llama.cpp's `--lora` applies while the model runs.

    Each weight keeps its own rank. llama.cpp computes a weight's scale as one alpha over its rank:
    scales for which that does not hold, as rsLoRA's at several ranks, are multiplied into B. Where
    arrays span processes, all processes call this together, and process 0 writes.

    Args:
      path: the file; written completely or not at all.
      adapters: an overlay, or a joined tree, which brings its own base.
      names: what llama.cpp calls the model and its tensors: `models.gguf_names(model)`.
      base: the base of an overlay, arrays or `ShapeDtypeStruct`s.
      base_model: the name of the base model, to keep in the file.

    Raises:
      StructureError: llama.cpp cannot apply these adapters; all problems are listed at once: DoRA,
        fully trained leaves or rows, convolutions, paths that are not in the naming, values that
        are NaN or infinite.
      OSError: the file cannot be written; an old one is kept.
      OtherProcessError: in the other processes, where process 0 raises `OSError`.
    """
    contents, model = collect(adapters, names.naming, base)
    problems = _problems(contents, model)
    if names.tied:
        problems += [
            f"{name}: the head is tied to it, and llama.cpp stops at an adapter of such an "
            "embedding; merge the adapters, or leave the embedding out"
            for name in contents.factors
            if is_embedding(name)
        ]
    if problems or not (contents.factors or contents.experts):
        lines = "\n".join(sorted(problems)) or "no weight has LoRA factors"
        raise StructureError(f"save: a GGUF adapter cannot hold these adapters:\n{lines}")
    alpha, found = _with_one_alpha({**contents.factors, **contents.experts})
    check(_unloadable(found))
    metadata: dict[str, gguf_writer.Value] = {
        "general.architecture": names.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: alpha,
    }
    if base_model is not None:
        metadata |= {"general.base_model.count": 1, BASE_NAME: base_model}
    data = gguf_writer.encode(metadata, _tensors(found))
    processes.by_first(
        lambda: write_atomically(path, data), several=processes.span_processes(adapters, base)
    )


def _problems(contents: Contents, model: TorchBase) -> list[str]:
    """Return what llama.cpp does not apply."""
    problems = [
        f"{name}: is fully trained, but a GGUF adapter holds LoRA factors alone; merge the adapters"
        for name in (*contents.whole, *contents.rows)
    ]
    for name, one in contents.factors.items():
        if one.magnitude is not None:
            problems.append(
                f"{name}: llama.cpp has no DoRA; merge the adapters into the model, or make a "
                "LoRA of their difference with lora_jax.extract"
            )
        if model.kind(name) not in _KINDS:
            problems.append(f"{name}: is neither a linear layer nor the token embedding")
        elif (model.kind(name) == "embedding") != is_embedding(name):
            problems.append(f"{name}: llama.cpp looks up adapted rows of token_embd.weight alone")
    return problems


def _with_one_alpha(
    factors: Mapping[str, TorchFactors | Experts],
) -> tuple[float, dict[str, TorchFactors | Experts]]:
    """Return alpha, and the factors, scaled so that each scale is alpha over the rank."""
    alphas = {name: _as_float32(one.scale * one.rank) for name, one in factors.items()}
    usable = Counter(x for x in alphas.values() if x and np.isfinite(x))  # 0 means a scale of 1
    alpha = usable.most_common(1)[0][0] if usable else 1.0
    scaled: dict[str, TorchFactors | Experts] = {}
    for name, one in factors.items():
        if alphas[name] == alpha:
            scaled[name] = one
        elif isinstance(one, Experts):
            rest = dataclasses.replace(one, scale=one.scale * one.rank / alpha)
            scaled[name] = rest.fold(one.rank)
        else:
            scaled[name] = dataclasses.replace(one, scale=one.scale * one.rank / alpha).fold()
    return alpha, scaled


def _as_float32(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def _unloadable(factors: Mapping[str, TorchFactors | Experts]) -> list[str]:
    found = Contents()
    for name, one in factors.items():
        if isinstance(one, Experts):
            found.experts[name] = one
        else:
            found.factors[name] = one
    return find_unloadable(found)


def _tensors(factors: Mapping[str, TorchFactors | Experts]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, one in factors.items():
        a = one.a.T if is_embedding(name) else one.a
        for ending, x in ((A, a), (B, one.b)):
            known = x.dtype in gguf_writer.DTYPES
            tensors[f"{name}.{ending}"] = x if known else x.astype(np.float32)
    return tensors
