"""Published models by their path: load, save, and the naming of their leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.core.errors import ModelFileError, StructureError
from lora_jax.files import naming as names
from lora_jax.files.naming import Naming
from lora_jax.models import hf_directory, llama_gguf, namings
from lora_jax.models.bert import Bert, BertConfig
from lora_jax.models.llama import Llama
from lora_jax.models.llama_config import DTYPES, MODEL_TYPES, LlamaConfig

#: model_type in config.json -> the kind of model here that it is.
KINDS = {"bert": "bert", **dict.fromkeys(MODEL_TYPES, "llama")}
#: What transformers calls the classes that read what `save` writes.
_ARCHITECTURES = {
    "bert": "BertModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


@dataclass(frozen=True)
class Apply:
    """A module as a function of its parameters: `apply(params, *args)`.

    Two of equal modules are equal, so that a function compiled with one as a static argument is
    not compiled again.
    """

    module: nn.Module

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` with `params` as its parameters; `method="hidden"` and so on as there."""
        return self.module.apply({"params": params}, *args, **kwargs)


@dataclass(frozen=True)
class Pretrained:
    """A published model.

    Attributes:
      kind: "bert" or "llama" (Llama, Mistral, Qwen2, SmolLM2).
      config: its sizes.
      module: the Flax module; it is called with `{"params": params}`.
      params: the tree of its parameters.
      naming: Hugging Face's name of every leaf, whatever file they come from.
      settings: what its config.json says, or would say.
      rest: other tensors in the file, by name, such as BERT's pooler: `save` writes them back.
    """

    kind: str
    config: BertConfig | LlamaConfig
    module: Bert | Llama
    params: Any
    naming: Naming
    settings: Mapping[str, Any]
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def apply(self) -> Apply:
        """The model as a function of `params`: `apply(params, ids, segments)`."""
        return Apply(self.module)


def load(
    path: str | Path, dtype: Any = None, *, scan: bool = False, remat: bool = False
) -> Pretrained:
    """Reads a published model: BERT, Llama, Mistral, Qwen2 or SmolLM2.

    Args:
      path: of a directory in Hugging Face's layout (config.json and safetensors, in one file or
        several), or of a GGUF file of the Llama family.
      dtype: of parameters and arithmetic: float32, bfloat16 or float16. By default the widest
        that the file holds; what is quantized is read as float32.
      scan: stack the layers, as `LlamaConfig` has it.
      remat: as `LlamaConfig` has it.

    Returns:
      The model, its parameters on the default device.

    Raises:
      FileNotFoundError: there is no such file, or no weights in the directory.
      ValueError: for another kind of model, for a configuration that the model refuses, or when
        tensors are missing, unexpected or of another shape: all of them are listed. Also for a
        file that is damaged.
    """
    source = _open(Path(path))
    dtype = _dtype(dtype, source.tensors)
    kept, ignored = namings.KEPT[source.kind], source.ignored
    try:
        _check_sizes(source)
        module = _module(source, dtype, scan=scan, remat=remat)
        like = _like(module, dtype)
        params = names.to_tree(source.naming, source.tensors, like, ignore=(*ignored, *kept))
    except StructureError as error:
        lines = str(error).replace("\n", "\n  ")
        problem = f"{path} does not hold what its settings ask for:\n  {lines}"
        raise ModelFileError(problem) from error
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error
    rest = {
        name: tensor
        for name, tensor in source.tensors.items()
        if any(re.fullmatch(pattern, name) for pattern in kept)
    }
    return Pretrained(
        source.kind, module.config, module, params, source.torch, source.settings, rest
    )


def naming_of(path: str | Path) -> Naming:
    """The naming that `load` would return, without reading any weights.

    Raises:
      FileNotFoundError, ValueError: as `load`, for what is read.
    """
    return _open(Path(path)).torch


def save(directory: str | Path, pretrained: Pretrained) -> None:
    """Writes config.json and model.safetensors, for `transformers` and for `load`.

    Args:
      directory: made where it is missing; other files in it, such as a tokenizer's, stay.
      pretrained: a model; its `params` are plain arrays (merge adapters first). They are written
        in the dtype that they have.

    Raises:
      StructureError: leaves that the model does not have, such as adapters: all are listed.
      ModelFileError: the directory holds a model in several files.
    """
    hf_directory.write(directory, *_written(pretrained))


def files(pretrained: Pretrained) -> dict[str, bytes]:
    """The files that `save` writes, by name, to write with others in one step.

    Raises:
      StructureError: as `save`.
    """
    return hf_directory.files(*_written(pretrained))


def _written(pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What config.json says, and the tensors."""
    params, kind = pretrained.params, pretrained.kind
    tensors = names.to_torch(pretrained.naming, params) | {
        name: np.asarray(tensor) for name, tensor in pretrained.rest.items()
    }
    model_type = pretrained.settings.get("model_type", kind)
    settings = {"architectures": [_ARCHITECTURES[model_type]], **pretrained.settings}
    # "torch_dtype" until transformers 4.55, which later ones read too
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    settings[key] = str(jnp.result_type(*jax.tree.leaves(params)))
    return settings, tensors


@dataclass(frozen=True)
class _Source:
    """A file or directory before any weight is read."""

    kind: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]
    naming: Naming  # the names in the file
    torch: Naming  # Hugging Face's names
    ignored: tuple[str, ...]


def _open(path: Path) -> _Source:
    if path.is_file():
        settings, quantized = llama_gguf.load(path)
        kind = _kind(settings, path)
        torch = namings.naming(kind)
        in_file = llama_gguf.naming(torch, settings)
        return _Source(kind, settings, quantized, in_file, torch, llama_gguf.IGNORED)
    settings = hf_directory.read_config(path)
    kind = _kind(settings, path)
    tensors = hf_directory.tensors(path)
    torch = namings.naming(kind, tensors)
    tied = (namings.TIED_HEAD,) if settings.get("tie_word_embeddings") else ()
    return _Source(kind, settings, tensors, torch, torch, (*namings.DROPPED[kind], *tied))


def _kind(settings: Mapping[str, Any], path: Path) -> str:
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in KINDS:
        raise ModelFileError(f"{path}: model_type {model_type!r} is not one of {sorted(KINDS)}")
    return KINDS[model_type]


def _check_sizes(source: _Source) -> None:
    """Refuses sizes beyond the file's before anything is made of them."""
    numbers = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    limits = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), numbers)
    for name, limit in (limits | {"num_hidden_layers": len(source.tensors)}).items():
        size = source.settings.get(name)
        if isinstance(size, int) and size > limit:
            raise ModelFileError(f"{name} is {size}, the files hold no more than {limit}")


def _dtype(dtype: Any, tensors: Mapping[str, Any]) -> str:
    """The name of the dtype that is asked for, or of the widest that the tensors have."""
    if dtype is None:
        stored = {x.dtype for x in tensors.values() if jnp.issubdtype(x.dtype, jnp.floating)}
        widest = jnp.result_type(*stored) if stored else jnp.float32
        return "float32" if widest == jnp.float64 else str(jnp.dtype(widest))
    name = str(jnp.dtype(dtype))
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not one of {', '.join(DTYPES)}")
    return name


def _module(source: _Source, dtype: str, *, scan: bool, remat: bool) -> Bert | Llama:
    if source.kind == "llama":
        ours = {"scan": scan, "remat": remat, "dtype": dtype, "param_dtype": dtype}
        return Llama(LlamaConfig.from_json(source.settings, **ours))
    if scan or remat:
        raise ValueError(f"scan and remat: {source.kind} has neither")
    return Bert(BertConfig.from_json(source.settings))


def _like(module: nn.Module, dtype: str) -> Any:
    """The shapes of a module's parameters; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
