"""Decoders in GGUF files: sizes under config.json's names, tensors, a naming.

This inverts llama.cpp's convert_hf_to_gguf.py.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.checks import is_size
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.disk import gguf_file, gguf_schema
from lora_jax.files.disk.gguf_file import GgufTensor
from lora_jax.files.naming import KINDS, Entry, Naming
from lora_jax.models.decoder.gguf_architectures import (
    ARCHITECTURE_OF,
    WITH_EXPERTS,
    Architecture,
    architecture,
    shortened,
)

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

#: Other tensors in the file, whose content `read_model` puts into the settings.
IGNORED = (r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight")


def read_model(path: str | Path) -> tuple[dict[str, Any], Mapping[str, gguf_file.GgufTensor]]:
    """Read a decoder from a GGUF file.

    Args:
      path: the file. Its numbers may be float32, float16, bfloat16, or quantized in any way that
        the package `gguf` can dequantize.

    Returns:
      Settings under config.json's names, and the tensors by llama.cpp's names. A tensor has a
      `shape`; `np.asarray` reads it as float32. `file_naming` says which leaf it is.

    Raises:
      FileNotFoundError: the file does not exist.
      ModelFileError: it is not a complete GGUF file, contains a model of another architecture, or
        lacks one of the sizes.
    """
    file = gguf_file.read(path)
    kind = file.metadata.get("general.architecture")
    try:
        row = architecture(kind, experts=is_size(file.metadata.get(f"{kind}.expert_count")))
        settings = _settings(file, str(kind), row)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return settings, _without_one(file.tensors) if row.one_added else file.tensors


def _without_one(tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """Return the tensors, those of norms as Hugging Face has them."""
    return {
        name: _OneAdded(**vars(x)) if name.endswith("norm.weight") else x
        for name, x in tensors.items()
    }


class _OneAdded(GgufTensor):
    """A tensor whose numbers have one added in the file."""

    def _decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return super()._decode(stored, shape) - np.float32(1)

    def codes(self) -> None:
        return None


def _settings(file: gguf_file.GgufFile, kind: str, row: Architecture) -> dict[str, Any]:
    gguf_schema.check(file.metadata, gguf_schema.DECODER, f"{kind}.")
    keys = {name: f"{kind}.{name}" for name in gguf_schema.DECODER}
    known = {
        name: shortened(file.metadata[key]) for name, key in keys.items() if key in file.metadata
    }
    if missing := [name for name in _SIZES.values() if name not in known]:
        raise ModelFileError(f"it lacks {', '.join(f'{kind}.{x}' for x in missing)}")
    if known["attention.head_count"] > known["embedding_length"]:
        raise ModelFileError(
            f"{kind}.attention.head_count {known['attention.head_count']} is above "
            f"{kind}.embedding_length {known['embedding_length']}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelFileError("it lacks token_embd.weight")
    names = _SIZES | {ours: name for ours, name in _OPTIONAL.items() if name in known}
    settings = {
        "model_type": row.model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
    }
    settings |= {ours: known[name] for ours, name in names.items()}
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    settings |= {"hidden_act": "silu", "tie_word_embeddings": "output.weight" not in file.tensors}
    ids = {ours: file.metadata.get(f"tokenizer.ggml.{x}_token_id") for ours, x in _IDS.items()}
    settings |= {ours: number for ours, number in ids.items() if number is not None}
    scaling = _infer_scaling(known, file.tensors.get("rope_freqs.weight"), row)
    settings |= {"rope_scaling": scaling} if scaling else {}
    return settings | row.settings(known, file.tensors)


def _infer_scaling(
    known: Mapping[str, Any], factors: Any, row: Architecture
) -> dict[str, Any] | None:
    """Return config.json's `rope_scaling`."""
    kind, factor = known.get("rope.scaling.type", "none"), known.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise ModelFileError(f"rotary embeddings of type {shown_value(kind)} are not supported")
    size = known.get("attention.key_length")
    size = size or known["embedding_length"] // known["attention.head_count"]
    if known.get("rope.dimension_count", size) != size and row.model_type != "phi3":
        raise ModelFileError(
            f"rotary embeddings of only a part of the head size {size} are not supported"
        )
    if factors is None and kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor}
        more = {ours: known[name] for ours, name in _YARN.items() if name in known}
        return found | more
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if kind == "linear" else None
    return _infer_llama3(np.asarray(factors), theta=known.get("rope.freq_base", 10000.0), size=size)


def _infer_llama3(divisors: np.ndarray, theta: float, size: int) -> dict[str, Any]:
    """Infer Llama 3.1's scaling from what the file has of it: the divisor of each frequency.

    With the usual limits of one and four turns, the waves between them tell the original length.
    """
    low, high, factor = 1.0, 4.0, float(divisors.max())
    turns_of_one = theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)  # per token
    kept = (factor / divisors - 1) / max(factor - 1, 1e-9)
    between = (kept > 0.01) & (kept < 0.99)
    original = 8192
    if divisors.shape == turns_of_one.shape and between.any():
        original = round(float(np.median(((low + (high - low) * kept) / turns_of_one)[between])))
    kept = np.clip((original * turns_of_one - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelFileError("rope_freqs.weight does not contain the divisors of Llama 3.1")
    limits = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": "llama3", **limits, "original_max_position_embeddings": original}


def file_naming(torch: Naming, settings: Mapping[str, Any]) -> Naming:
    """Return a model's `Naming` with llama.cpp's names instead of Hugging Face's.

    Args:
      torch: Hugging Face's names of the same model's leaves.
      settings: from `read_model`, or of config.json.
    """
    kind = settings["model_type"]
    row = architecture(ARCHITECTURE_OF.get(kind), experts=kind in WITH_EXPERTS)
    heads = settings["num_attention_heads"]
    sizes = {"q_proj": heads, "k_proj": settings.get("num_key_value_heads", heads)}
    rows = []
    for entry in torch.entries:
        names = tuple(filter(None, (_rename(x, row.modules) for x in entry.torch_names)))
        if not names:
            continue  # the architecture has no such layer
        found = re.search("q_proj|k_proj", entry.torch_names[0])
        if row.interleaved and found:
            entry = _interleave_heads(entry, sizes[found[0]])
        rows.append(dataclasses.replace(entry, torch=names if len(names) > 1 else names[0]))
    return Naming((*rows, *row.rows()))


def _rename(name: str, modules: Mapping[str, str]) -> str:
    """Return llama.cpp's name, "" if there is none."""
    layer = re.fullmatch(r"model\.layers\.(\{?\w+\}?)\.(.*)\.(\w+)", name)
    prefix, module, leaf = (
        (f"blk.{layer[1]}.", layer[2], layer[3]) if layer else ("", *name.rsplit(".", 1))
    )
    return f"{prefix}{modules[module]}.{leaf}" if module in modules else ""


def _interleave_heads(entry: Entry, heads: int) -> Entry:
    """Interleave the pairs of a rotation, as the file has them: PyTorch's out axis is split."""
    left, right = (entry.axes or KINDS[entry.kind][1] or "o -> o").split("->")
    out = left.split()[0]
    turn = lambda side, pair: re.sub(rf"\b{out}\b", f"(heads {pair})", side)
    axes = f"{turn(left, 'half two')}->{turn(right, 'two half')}"
    return dataclasses.replace(entry, axes=axes, sizes={"heads": heads, "two": 2})
