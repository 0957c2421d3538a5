"""Rows as token ids, and which of the tokens train: prompts and users' turns do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lora_jax.training.dataset import STREAM, Row, Rows
from lora_jax.training.errors import DataError, listed


class Encoder(Protocol):
    """What is asked of a tokenizer; `lora_jax.models.text.Tokenizer` is one."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where there is one."""

    def encode(self, text: str, special: bool = False) -> Sequence[int]:
        """The ids of a text, with `special` also those that the model expects around it."""

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """A conversation in the model's chat template; raises `ValueError` without one."""


@dataclass(frozen=True)
class Example:
    """One text to learn from."""

    ids: np.ndarray  # int32 [length]
    trains: np.ndarray  # bool [length]: whether the token is to be predicted

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """The texts of a file, each no longer than a row."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # what was cut or left out, a sentence each


def encode_examples(rows: Rows, tokenizer: Encoder, length: int) -> Examples:
    """Token ids and masks of the rows of a language model's data.

    - text: BOS (where the tokenizer itself puts one before a text), the text, EOS; all of it
      trains. One that is longer than `length` is cut into pieces that train as texts of their own.
    - prompt and completion: encoded one by one, as they meet when the model generates; BOS stands
      before, EOS behind, the completion and EOS train. What is beyond `length` is cut off.
    - chat: rendered by the tokenizer's template; what the assistant says trains, to the end of its
      turn as the template marks it. What is beyond `length` is cut off.

    Args:
      rows: of kind "text", "completion" or "chat".
      tokenizer: gives ids.
      length: tokens of the longest example, 2 at least.

    Raises:
      DataError: rows of another kind, a conversation that the template refuses or does not extend
        turn by turn, or no tokens left that train.
    """
    if rows.kind not in _ENCODERS:
        raise DataError(
            f"{rows.source}: {rows.kind} rows are not for a language model; "
            "use --task classification, or leave the labels out"
        )
    encoded: list[Example] = []
    problems: list[str] = []
    for row in rows.rows:
        try:
            encoded.append(_ENCODERS[rows.kind](row, tokenizer))
        except ValueError as error:
            problems.append(f"line {row.line}: {error}")
    if problems:
        raise DataError(f"{rows.source}: rows that cannot be encoded:\n{listed(problems)}")
    fit = _in_pieces if rows.kind == "text" else _cut_off
    return _with_notes(rows, encoded, fit(encoded, length), length)


def encode_stream(rows: Rows, tokenizer: Encoder) -> np.ndarray:
    """The token ids of a `.txt` file, int32 `[n]`, as they come: nothing opens or ends them.

    Raises:
      DataError: the text is a single token, so that nothing can be predicted.
    """
    assert rows.kind == STREAM
    ids = np.asarray(tokenizer.encode(rows.rows[0].values["text"]), np.int32)
    if len(ids) < 2:
        raise DataError(f"{rows.source}: the text is one token; there is nothing to learn from it")
    return ids


def _text(row: Row, tokenizer: Encoder) -> Example:
    return _join(tokenizer, [(row.values["text"], True)], ended=True)


def _completion(row: Row, tokenizer: Encoder) -> Example:
    pieces = [(row.values["prompt"], False), (row.values["completion"], True)]
    return _join(tokenizer, pieces, ended=True)


def _chat(row: Row, tokenizer: Encoder) -> Example:
    pieces = chat_pieces(row.values["messages"], tokenizer.chat)
    # A template writes BOS and the ends of turns itself.
    return _join(tokenizer, pieces, ended=False)


_ENCODERS: Mapping[str, Callable[[Row, Encoder], Example]] = {
    "text": _text,
    "completion": _completion,
    "chat": _chat,
}


def _join(tokenizer: Encoder, pieces: Sequence[tuple[str, bool]], ended: bool) -> Example:
    """Pieces of text, each with whether it trains, encoded one by one."""
    parts = [(list(tokenizer.encode(text)), trains) for text, trains in pieces]
    if ended:
        parts.insert(0, (surrounding(tokenizer)[0], False))
        parts.append(([] if tokenizer.eos_id is None else [tokenizer.eos_id], True))
    ids = np.array([i for part, _ in parts for i in part], np.int32)
    trains = np.array([trains for part, trains in parts for _ in part], bool)
    return Example(ids, trains)


def surrounding(tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text, as BERT's [CLS] and [SEP].

    Not all that have a BOS put it there.
    """
    whole, plain = (list(tokenizer.encode("a", special=special)) for special in (True, False))
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    return [], []


def chat_pieces(
    messages: Sequence[Mapping[str, Any]], render: Callable[..., str]
) -> list[tuple[str, bool]]:
    """A rendered conversation in pieces, each with whether the assistant said it.

    The conversation is rendered before and after each turn of the assistant: what the turn adds,
    after the words that ask for it, is what the assistant says.

    Raises:
      ValueError: a rendering does not begin with the one before it, so that turns cannot be told
        apart (a template that rewrites earlier turns).
    """
    pieces: list[tuple[str, bool]] = []
    known = ""  # what is rendered so far
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(messages[:i], add_generation_prompt=True) if i else ""
        answered = render(messages[: i + 1], add_generation_prompt=False)
        if not asked.startswith(known) or not answered.startswith(asked):
            raise ValueError(
                f"the chat template does not extend the conversation at messages[{i}]; "
                "give it as prompt and completion"
            )
        pieces += [(asked[len(known) :], False), (answered[len(asked) :], True)]
        known = answered
    return [piece for piece in pieces if piece[0]]


def _in_pieces(examples: Sequence[Example], length: int) -> list[Example]:
    """Longer texts in pieces, each beginning with the last token of the one before it."""
    return [
        Example(example.ids[start : start + length], example.trains[start : start + length])
        for example in examples
        for start in range(0, max(1, len(example) - 1), length - 1)
    ]


def _cut_off(examples: Sequence[Example], length: int) -> list[Example]:
    return [Example(example.ids[:length], example.trains[:length]) for example in examples]


def _with_notes(
    rows: Rows, whole: Sequence[Example], cut: Sequence[Example], length: int
) -> Examples:
    """The examples that train at all, and sentences on those that were cut or left out."""
    notes = []
    long = sum(len(example) > length for example in whole)
    if long and rows.kind == "text":
        notes.append(f"{long} of {len(whole)} texts exceed {length} tokens: cut into pieces")
    elif long:
        lost = sum(int(e.trains[length:].sum()) for e in whole)
        notes.append(
            f"{long} of {len(whole)} rows exceed {length} tokens: cut off, and with them {lost:,} "
            f"of {sum(int(e.trains.sum()) for e in whole):,} tokens to learn (see --length)"
        )
    # The first token of a row is never predicted.
    kept = tuple(example for example in cut if example.trains[1:].any())
    if not kept:
        raise DataError(
            f"{rows.source}: no token to learn is left in rows of {length} tokens; raise --length"
        )
    if rows.kind != "text" and len(kept) < len(cut):
        notes.append(f"{len(cut) - len(kept)} rows left out: nothing to learn in {length} tokens")
    return Examples(kept, tuple(notes))
