"""A model, its tokenizer and its adapter, ready to continue token ids with text."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import PromptError
from lora_jax.cli.fit import Fit
from lora_jax.models import Pretrained, generation, stops
from lora_jax.models.text.stop_text import until_text
from lora_jax.models.text.tokenizer import Tokenizer

#: Behind the path of a model or an adapter that generates no text.
CLASSIFIER = (
    "is a sequence classifier, which generates no text; use 'lora-jax predict' or 'lora-jax eval' "
    "with it"
)


@dataclass(frozen=True)
class Speaker:
    """What generates text.

    Attributes:
      model: the base.
      params: its parameters, joined with the adapters.
      apply: the model's function, transformed if there are adapters.
      tokenizer: the adapter's, or the model's.
      ends: token ids that end a text.
      stops: texts that end a text.
      max_tokens: maximum number of new tokens.
      sampling: options of `generation.stream`.
      slot: which adapter of a stack speaks, -1 for the base; None without a stack.
    """

    model: Pretrained
    params: Any
    apply: Callable[..., Any]
    tokenizer: Tokenizer
    ends: frozenset[int]
    stops: Sequence[str]
    max_tokens: int
    sampling: Mapping[str, Any]
    slot: int | None = None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, up to where the assistant speaks next."""
        # the template writes out the special tokens
        return self.tokenizer.encode(self.tokenizer.chat(messages, add_generation_prompt=True))

    def room(self, ids: Sequence[int]) -> int:
        """Return how many tokens can follow: `max_tokens`, or the positions left in the model.

        Raises:
          PromptError: the prompt is empty or does not fit into the model.
        """
        config = self.model.config
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
        return min(self.max_tokens, left)

    def speak(self, ids: Sequence[int], seed: int, padded: int = 0) -> Iterator[str]:
        """Yield the text that follows `ids` as it is generated, in pieces.

        Args:
          ids: the prompt.
          seed: of the sampling.
          padded: pad the prompt to this length, so that prompts of several lengths share a
            compilation.

        Raises:
          PromptError: as `room`.
        """
        steps = self.room(ids)
        fill = max(0, padded - len(ids))
        rows = np.array([[0] * fill + list(ids)], np.int32)
        segments = np.array([[0] * fill + [1] * len(ids)], np.int32)
        tokens = generation.stream(
            self.apply,
            self.params,
            rows,
            self.model.module.init_cache(1, rows.shape[1] + steps),
            steps=steps,
            segments=segments,
            key=jax.random.key(seed),
            stop=self.ends,
            adapters_of=None if self.slot is None else [self.slot],
            **self.sampling,
        )
        return until_text(self.tokenizer.stream(_until(tokens, self.ends)), self.stops)


def open_speaker(
    model: str,
    adapter: Path | None,
    *,
    max_tokens: int,
    dtype: str | None,
    quantize: str | None,
    fit: Fit,
    stop: Sequence[str],
    sampling: Mapping[str, Any],
    encode: Callable[[Tokenizer], object] = lambda tokenizer: None,
    scan: bool = False,
) -> Speaker:
    """Load what a command generates with.

    Args:
      encode: called with the tokenizer before the weights are read, which takes longer: a mistake
        in the prompt is told at once.
      scan: without an adapter, stack the layers.

    Raises:
      PromptError: the model cannot generate text.
      LoraError: the model, its tokenizer or the adapter cannot be read.
    """
    base = sources.find_model(model)
    if named := classifiers.find(base, adapter):
        raise PromptError(f"{named}: {CLASSIFIER}")
    sources.require_kind(base, "decoder")
    tokenizer = sources.tokenizer_of(base, adapter)
    encode(tokenizer)
    loaded = sources.load(base, adapter, dtype, fit, quantize=quantize, scan=scan)
    check_generates(loaded.model)
    run = loaded.model.apply
    return Speaker(
        model=loaded.model,
        params=loaded.params,
        apply=lora.lora(run) if adapter or quantize else run,
        tokenizer=tokenizer,
        ends=sources.stop_ids(base, tokenizer) | stops.special_ids(tokenizer, stop),
        stops=stop,
        max_tokens=max_tokens,
        sampling=sampling,
    )


def check_generates(model: Pretrained) -> None:
    """Raise `PromptError` unless the model generates text."""
    if model.kind != "decoder":
        raise PromptError(
            f"{model.family.stem} cannot generate text; give a decoder, such as a Llama"
        )


def _until(tokens: Iterator[np.ndarray], stop: Collection[int]) -> Iterator[int]:
    """Yield the ids of the only row, up to one that ends the text."""
    for row in tokens:
        if int(row[0]) in stop:
            return
        yield int(row[0])
