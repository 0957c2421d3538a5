"""The tensors of a published model by the names of the float model's, quantized or not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError, ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files import quantized
from lora_jax.files.naming import codes_of
from lora_jax.models import hf_directory

#: Where config.json says how the weights are quantized; the second name is of older files.
_CONFIGS = ("quantization_config", "compression_config")
_GPTQ_CONFIG = "quantize_config.json"  # of AutoGPTQ, where config.json says nothing
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Published:
    """A directory whose weights have not been read yet.

    Attributes:
      settings: the content of config.json, without how the weights are quantized.
      tensors: by the names of the float model's; a quantized one has a method `codes`.
      method: `quant_method`, or None for floating weights.
      ignored: regexes of tensors that mean nothing where the model has no place for them.
    """

    settings: dict[str, Any]
    tensors: Mapping[str, Any]
    method: str | None = None
    ignored: tuple[str, ...] = ()


def open_directory(path: str | Path, settings: Mapping[str, Any]) -> Published:
    """Return the tensors of a directory whose config.json has these settings.

    Raises:
      FileNotFoundError: it has no weights.
      ModelFileError: a file is damaged, or the weights are quantized in an unknown way.
    """
    tensors = hf_directory.tensors(path)
    found = [settings[name] for name in _CONFIGS if settings.get(name)]
    settings = {name: x for name, x in settings.items() if name not in _CONFIGS}
    packed = any(name.endswith(".qweight") for name in tensors)
    if not found and packed and (Path(path) / _GPTQ_CONFIG).is_file():
        found = [{"quant_method": "gptq", **hf_directory.read_config(path, _GPTQ_CONFIG)}]
    if not found:
        return Published(settings, tensors)
    stated = settings.get("dtype", settings.get("torch_dtype"))
    dtype = jnp.dtype(stated) if stated in _DTYPES else None
    try:
        weights = quantized.read(tensors, found[0], dtype)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    method = str(found[0].get("quant_method") or "bitsandbytes")
    return Published(settings, weights, method, _zero_biases(tensors))


def _zero_biases(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the biases of GPTQ's layers that are zero: old files have them for every layer."""
    biases = [f"{x.removesuffix('.qweight')}.bias" for x in tensors if x.endswith(".qweight")]
    return tuple(
        re.escape(name) for name in biases if name in tensors and not np.any(tensors[name])
    )


def read_tensors(
    path: str | Path, names: str = ".*", *, quantize: str | None = None
) -> dict[str, jax.Array | QuantizedWeight]:
    """Read tensors of any model in Hugging Face's layout, such as gpt-oss's experts in MXFP4.

    The architecture does not matter, so a model that `load` does not know can be read too. How the
    weights are quantized is in config.json: bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8 and
    MXFP4 can be read.

    Args:
      path: a directory with config.json, and safetensors in one or more files.
      names: a regex that matches the whole names of the tensors to read. A quantized weight has
        the name that it has in the float model, "model.layers.0.self_attn.q_proj.weight".
      quantize: "keep" for quantized weights as the codes in the file; by default they are
        dequantized.

    Returns:
      The tensors by name, with PyTorch's axes and the dtypes in the file. A kept weight is a
      `QuantizedWeight`.

    Raises:
      FileNotFoundError: the directory has no config.json or no weights.
      ConfigError: `names` is not a regex, or `quantize` is unknown.
      ModelFileError: a file is damaged, or the weights are quantized in an unknown way.
    """
    if quantize not in (None, "keep"):
        raise ConfigError(f"quantize: {shown_value(quantize)} is not 'keep' or None")
    try:
        pattern = re.compile(names)
    except (re.error, TypeError) as error:
        raise ConfigError(f"names: {shown_value(names)} is not a regex: {error}") from None
    tensors = open_directory(path, hf_directory.read_config(path)).tensors
    keep = quantize == "keep"
    return {name: _read(x, keep) for name, x in tensors.items() if pattern.fullmatch(name)}


def _read(tensor: Any, keep: bool) -> jax.Array | QuantizedWeight:
    codes = codes_of(tensor) if keep else None
    if codes is None:
        return jnp.asarray(np.asarray(tensor), tensor.dtype)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), codes)
