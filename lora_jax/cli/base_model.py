"""The model that `lora-jax train` trains on, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_jax import models
from lora_jax.cli import kinds, sources
from lora_jax.models import checkpoints
from lora_jax.naming import Naming
from lora_jax.text import Tokenizer


@dataclass(frozen=True)
class Model:
    """A model as what trains it sees it."""

    params: Any
    naming: Naming
    tokenizer: Tokenizer
    apply: Callable[[Any, Any, Any], Any] | None  # (params, ids, segments) -> logits; not of BERT
    hidden: Callable[[Any, Any, Any], Any]  # (params, ids, segments) -> [rows, length, width]
    head: Callable[[Any, Any], Any]  # (params, hidden) -> logits; not of BERT
    width: int
    vocabulary: int
    longest: int  # tokens of a row


def open_model(name: str, dtype: str | None, scan: bool) -> Model:
    """Loads a model and its tokenizer.

    Args:
      name: see `sources.find_model`.
      dtype: of parameters and arithmetic; None for the file's.
      scan: whether layers are stacked, where the model can.

    Raises:
      LoraError, FileNotFoundError: there is no such model, or it cannot be read.
    """
    found = sources.find_model(name)
    tokenizer = sources.tokenizer_of(found)
    is_bert = (
        found.kind == kinds.CHECKPOINT
        and checkpoints.read_config(found.path).get("model_type") == "bert"
    )
    model = models.load(found.path, dtype, scan=scan and not is_bert)
    apply = model.apply
    return Model(
        params=model.params,
        naming=model.naming,
        tokenizer=tokenizer,
        apply=None if is_bert else apply,
        hidden=apply if is_bert else lambda *inputs: apply(*inputs, method="hidden"),
        head=lambda params, hidden: apply(params, hidden, method="logits"),
        width=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        longest=model.config.max_position_embeddings,
    )
