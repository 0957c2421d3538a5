"""What `lora-jax generate` does: a prompt to token ids, and new ids to text as they come."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.errors import PromptError
from lora_jax.models import Pretrained, generation
from lora_jax.models.text.tokenizer import Tokenizer


def run(
    model: str,
    adapter: Path | None,
    prompt: str,
    *,
    chat: bool,
    max_tokens: int,
    seed: int,
    dtype: str | None,
    **sampling: Any,
) -> None:
    """Print what the model says; the arguments are the command's options.

    Raises:
      PromptError: the model is none that can go on, or the prompt does not fit into it.
      LoraError: the model, its tokenizer or the adapter cannot be read.
    """
    base = sources.find_model(model)
    tokenizer = sources.tokenizer_of(base)
    ids = _encode(tokenizer, prompt, chat)
    loaded = sources.load(base, adapter, dtype)
    pretrained = loaded.model
    steps = _room(pretrained, ids, max_tokens)
    stop = _stops(pretrained, tokenizer)
    apply = lora.lora(pretrained.apply) if adapter else pretrained.apply
    tokens = generation.stream(
        apply,
        loaded.params,
        np.asarray([ids]),
        pretrained.module.init_cache(1, len(ids) + steps),
        steps=steps,
        key=jax.random.key(seed),
        stop=stop,
        **sampling,
    )
    for piece in tokenizer.stream(_until(tokens, stop)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if chat:  # a template writes the special tokens out
        turn = {"role": "user", "content": prompt}
        return tokenizer.encode(tokenizer.chat([turn], add_generation_prompt=True))
    return tokenizer.encode(prompt, special=True)


def _room(pretrained: Pretrained, ids: list[int], max_tokens: int) -> int:
    """How many tokens there can be: as many as asked for, or as the model has positions left."""
    if pretrained.kind == "bert":
        raise PromptError("a BERT reads texts and writes none: give a model of the Llama family")
    config = pretrained.config
    if not ids:
        raise PromptError("the prompt has no tokens; give some text to go on from")
    if max(ids) >= config.vocab_size:
        raise PromptError(
            f"the tokenizer's token {max(ids)} is beyond the model's {config.vocab_size}: it is "
            "another model's"
        )
    left = config.max_position_embeddings - len(ids)
    if left < 1:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, and the model "
            f"{config.max_position_embeddings} positions: shorten it"
        )
    return min(max_tokens, left)


def _stops(pretrained: Pretrained, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text, by the model's settings and by the tokenizer's."""
    said = pretrained.settings.get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    return {i for i in (*ids, tokenizer.eos_id) if isinstance(i, int)}


def _until(tokens: Iterator[np.ndarray], stop: set[int]) -> Iterator[int]:
    """The ids of the only row, up to one that ends it."""
    for row in tokens:
        if int(row[0]) in stop:
            return
        yield int(row[0])
