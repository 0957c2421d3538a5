"""The model that `lora-jax train` trains on, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_jax import models
from lora_jax.cli import kinds, sources
from lora_jax.models import checkpoints
from lora_jax.models.llama_config import LlamaConfig
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
    head_path: str  # of the leaf that makes logits of hidden states; "" where there is none
    head: Callable[[Any], Any]  # params -> that leaf as [width, vocabulary]
    width: int
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
    tied = isinstance(model.config, LlamaConfig) and model.config.tie_word_embeddings
    untied = "" if is_bert else "head/kernel"
    return Model(
        params=model.params,
        naming=model.naming,
        tokenizer=tokenizer,
        apply=None if is_bert else apply,
        hidden=apply if is_bert else lambda *inputs: apply(*inputs, method="hidden"),
        head_path="embedding/embedding" if tied else untied,
        head=lambda params: (
            params["embedding"]["embedding"].T if tied else params["head"]["kernel"]
        ),
        width=model.config.hidden_size,
        longest=model.config.max_position_embeddings,
    )
