"""What `lora-jax generate` does: encode a prompt, and print new tokens as they are generated."""

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
    strict: bool,
    **sampling: Any,
) -> None:
    """Print the generated text; the arguments are the command's options.

    Raises:
      PromptError: the model cannot generate text, or the prompt does not fit into it.
      LoraError: the model, its tokenizer or the adapter cannot be read.
    """
    base = sources.find_model(model)
    tokenizer = sources.tokenizer_of(base)
    ids = _encode(tokenizer, prompt, chat)
    loaded = sources.load(base, adapter, dtype, strict=strict)
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
    if chat:  # the template writes out the special tokens
        turn = {"role": "user", "content": prompt}
        return tokenizer.encode(tokenizer.chat([turn], add_generation_prompt=True))
    return tokenizer.encode(prompt, special=True)


def _room(pretrained: Pretrained, ids: list[int], max_tokens: int) -> int:
    """Return how many tokens to generate: `max_tokens`, or the positions left in the model."""
    if pretrained.kind == "bert":
        raise PromptError("BERT cannot generate text; give a model of the Llama family")
    config = pretrained.config
    if not ids:
        raise PromptError("the prompt has no tokens; give some text to continue")
    if max(ids) >= config.vocab_size:
        raise PromptError(
            f"the tokenizer gives token {max(ids)}, but the model's vocabulary has only "
            f"{config.vocab_size}: the tokenizer belongs to another model"
        )
    left = config.max_position_embeddings - len(ids)
    if left < 1:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, but the model has only "
            f"{config.max_position_embeddings} positions; shorten the prompt"
        )
    return min(max_tokens, left)


def _stops(pretrained: Pretrained, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text, by the model's settings and by the tokenizer's."""
    said = pretrained.settings.get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    return {i for i in (*ids, tokenizer.eos_id) if isinstance(i, int)}


def _until(tokens: Iterator[np.ndarray], stop: set[int]) -> Iterator[int]:
    """Yield the ids of the only row, up to one that ends the text."""
    for row in tokens:
        if int(row[0]) in stop:
            return
        yield int(row[0])
