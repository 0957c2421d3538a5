"""What `lora-jax generate` does: encode a prompt, and print new tokens as they are generated."""

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import PromptError
from lora_jax.models import Pretrained, generation
from lora_jax.models.text.stop_text import until_text
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
    stop: Sequence[str] = (),
    **sampling: Any,
) -> None:
    """Print the generated text; the arguments are the command's options.

    Raises:
      PromptError: the model cannot generate text, or the prompt does not fit into it.
      LoraError: the model, its tokenizer or the adapter cannot be read.
    """
    base = sources.find_model(model)
    if named := classifiers.find(base, adapter):
        raise PromptError(
            f"{named}: is a sequence classifier, which generates no text; use 'lora-jax predict' "
            "or 'lora-jax eval' with it"
        )
    tokenizer = sources.tokenizer_of(base, adapter)
    ids = _encode(tokenizer, prompt, chat)
    loaded = sources.load(base, adapter, dtype, strict=strict)
    pretrained = loaded.model
    steps = _room(pretrained, ids, max_tokens)
    ends = sources.stop_ids(base, tokenizer) | special_ids(tokenizer, stop)
    apply = lora.lora(pretrained.apply) if adapter else pretrained.apply
    tokens = generation.stream(
        apply,
        loaded.params,
        np.asarray([ids]),
        pretrained.module.init_cache(1, len(ids) + steps),
        steps=steps,
        key=jax.random.key(seed),
        stop=ends,
        **sampling,
    )
    for piece in until_text(tokenizer.stream(_until(tokens, ends)), stop):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if chat:  # the template writes out the special tokens
        turn = {"role": "user", "content": prompt}
        return tokenizer.encode(tokenizer.chat([turn], add_generation_prompt=True))
    return tokenizer.encode_prompt(prompt)


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


def special_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> set[int]:
    """Return the ids of stop texts that are special tokens, which no decoded text contains."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special and token.content in stops}


def _until(tokens: Iterator[np.ndarray], stop: Collection[int]) -> Iterator[int]:
    """Yield the ids of the only row, up to one that ends the text."""
    for row in tokens:
        if int(row[0]) in stop:
            return
        yield int(row[0])
