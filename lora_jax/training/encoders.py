"""What training asks of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lora_jax.training.turns import Span


class Encoder(Protocol):
    """What a tokenizer must provide; `lora_jax.models.text.Tokenizer` does, and more."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    def encode(self, text: str, special: bool = False) -> Sequence[int]:
        """Encode a text; with `special`, add the ids that the model expects around it."""

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation with the chat template; raise `ValueError` without one."""


@runtime_checkable
class SpanEncoder(Protocol):
    """A tokenizer that tells which characters an id stands for.

    With a tokenizer that does not, the parts of a text that train and those that do not are encoded
    one by one; that is right if no token depends on its neighbours.
    """

    def encode_spans(self, text: str) -> tuple[Sequence[int], Sequence[Span]]:
        """Encode a text whole, and return the characters of each id: first and last, exclusive."""

    def encode_continued(self, prompt: str, completion: str) -> tuple[Sequence[int], Sequence[int]]:
        """Encode a prompt as for generation, and what the model should continue it with."""

    def chat_spans(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Render as `chat` does, and return what the template marks as the assistant's, if any."""


@runtime_checkable
class BatchEncoder(Protocol):
    """A tokenizer that encodes several texts at once, on several threads."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Encode texts, each as `encode` does."""


class Encoded:
    """A tokenizer that looks up the ids of texts that are encoded already.

    Args:
      tokenizer: for all else.
      known: the ids of texts.
    """

    def __init__(self, tokenizer: Encoder, known: Mapping[str, Sequence[int]]) -> None:
        self._tokenizer, self._known = tokenizer, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        return self._tokenizer.eos_id

    def encode(self, text: str, special: bool = False) -> Sequence[int]:
        """Encode a text."""
        if not special and text in self._known:
            return self._known[text]
        return self._tokenizer.encode(text, special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation."""
        return self._tokenizer.chat(messages, add_generation_prompt)


def surrounding(tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text, as BERT's [CLS] and [SEP].

    Not every tokenizer with a BOS puts it there.
    """
    for text in ("a", "0", "."):  # one that the vocabulary has
        whole, plain = (list(tokenizer.encode(text, special=special)) for special in (True, False))
        for i in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[i : i + len(plain)] == plain:
                return whole[:i], whole[i + len(plain) :]
    return [], []
