"""The model that `--model` names, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import LoraError, assets
from lora_jax.models import checkpoints, pretrained
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.tiny import tiny
from lora_jax.naming import Naming
from lora_jax.text import Tokenizer
from lora_jax.text.letters import byte_tokenizer

SMOLLM2, TINY = "smollm2", "tiny"


class ModelError(LoraError):
    """A model cannot be found or used; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """A model as what trains it sees it."""

    params: Any
    naming: Naming
    tokenizer: Tokenizer
    apply: Callable[[Any, Any, Any], Any] | None  # (params, ids, segments) -> logits; not of BERT
    hidden: Callable[[Any, Any, Any], Any]  # (params, ids, segments) -> [rows, length, width]
    width: int
    longest: int  # tokens of a row


def open_model(name: str, dtype: str, scan: bool) -> Model:
    """Loads a model and its tokenizer.

    Args:
      name: a directory in Hugging Face's layout, a GGUF file, "smollm2" (fetched and cached), or
        "tiny" (random, made here).
      dtype: of parameters and arithmetic.
      scan: whether layers are stacked, where the model can.

    Raises:
      ModelError: there is no such model; other errors as `models.pretrained.load` raises them.
    """
    path = Path(name)
    if name == TINY:
        tokenizer = byte_tokenizer()
        return _model(tiny(len(tokenizer), dtype, scan=scan), tokenizer)
    if name == SMOLLM2:
        cache = assets.cache_directory()
        assets.fetch((assets.SMOLLM2,), cache)
        (file,) = assets.SMOLLM2.members
        path = assets.SMOLLM2.directory(cache) / file
    if not path.exists():
        raise ModelError(
            f"{name}: there is no such directory or file; give a directory with config.json, a "
            f".gguf file, or one of {SMOLLM2}, {TINY}"
        )
    if path.is_file():
        tokenizer = Tokenizer.from_gguf(path)
        return _model(pretrained.load(path, dtype, scan=scan), tokenizer)
    is_bert = checkpoints.read_config(path).get("model_type") == "bert"
    tokenizer = Tokenizer.load(path)
    return _model(pretrained.load(path, dtype, scan=scan and not is_bert), tokenizer)


def _model(found: Pretrained, tokenizer: Tokenizer) -> Model:
    run, is_bert = found.apply, found.kind == "bert"
    return Model(
        params=found.params,
        naming=found.naming,
        tokenizer=tokenizer,
        apply=None if is_bert else run,
        hidden=run if is_bert else lambda *inputs: run(*inputs, method="hidden"),
        width=found.config.hidden_size,
        longest=found.config.max_position_embeddings,
    )
