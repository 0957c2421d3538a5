"""Rows as token ids, with a mask of those to train on: prompts and user turns are not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lora_jax.training.dataset import STREAM, Row, Rows
from lora_jax.training.errors import DataError, list_problems


class Encoder(Protocol):
    """What a tokenizer must provide; `lora_jax.models.text.Tokenizer` does."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    def encode(self, text: str, special: bool = False) -> Sequence[int]:
        """Encode a text; with `special`, add the ids that the model expects around it."""

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation with the chat template; raise `ValueError` without one."""


@dataclass(frozen=True)
class Example:
    """One text to train on."""

    ids: np.ndarray  # int32 [length]
    trains: np.ndarray  # bool [length]: whether the token is to be predicted

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """The texts of a file, each no longer than a row."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # what was truncated or left out, one sentence each


def encode_examples(rows: Rows, tokenizer: Encoder, length: int) -> Examples:
    """Encode the rows of a language model's data, with masks of the tokens to train on.

    - text: BOS (if the tokenizer itself puts one before a text), the text, EOS; all of it is
      trained on. A text longer than `length` is cut into pieces that train as separate texts.
    - prompt and completion: encoded separately, as they meet when the model generates, with BOS
      before and EOS after; the completion and EOS are trained on. Tokens beyond `length` are
      dropped.
    - chat: rendered by the tokenizer's template; what the assistant says is trained on, to the end
      of its turn as the template marks it. Tokens beyond `length` are dropped.

    Args:
      rows: rows of kind "text", "completion" or "chat".
      tokenizer: turns text into ids.
      length: maximum number of tokens per example, at least 2.

    Raises:
      DataError: the rows are of another kind, the template refuses a conversation or does not
        extend it turn by turn, or no tokens are left to train on.
    """
    if rows.kind not in _ENCODERS:
        raise DataError(
            f"{rows.source}: a language model cannot be trained on {rows.kind} rows; use --task "
            "classification, or remove the labels"
        )
    encoded: list[Example] = []
    problems: list[str] = []
    for row in rows.rows:
        try:
            encoded.append(_ENCODERS[rows.kind](row, tokenizer))
        except ValueError as error:
            problems.append(f"line {row.line}: {error}")
    if problems:
        raise DataError(f"{rows.source}: rows that cannot be encoded:\n{list_problems(problems)}")
    fit = _cut_into_pieces if rows.kind == "text" else _cut_off
    return _keep_trainable(rows, encoded, fit(encoded, length), length)


def encode_stream(rows: Rows, tokenizer: Encoder) -> np.ndarray:
    """Return the token ids of a `.txt` file, int32 `[n]`, without BOS or EOS.

    Raises:
      DataError: the text is a single token, so there is nothing to predict.
    """
    assert rows.kind == STREAM
    ids = np.asarray(tokenizer.encode(rows.rows[0].values["text"]), np.int32)
    if len(ids) < 2:
        raise DataError(f"{rows.source}: the text is a single token; there is nothing to train on")
    return ids


def _encode_text(row: Row, tokenizer: Encoder) -> Example:
    return _encode_pieces(tokenizer, [(row.values["text"], True)], ended=True)


def _encode_completion(row: Row, tokenizer: Encoder) -> Example:
    pieces = [(row.values["prompt"], False), (row.values["completion"], True)]
    return _encode_pieces(tokenizer, pieces, ended=True)


def _encode_chat(row: Row, tokenizer: Encoder) -> Example:
    pieces = chat_pieces(row.values["messages"], tokenizer.chat)
    # The template writes BOS and the ends of turns.
    return _encode_pieces(tokenizer, pieces, ended=False)


_ENCODERS: Mapping[str, Callable[[Row, Encoder], Example]] = {
    "text": _encode_text,
    "completion": _encode_completion,
    "chat": _encode_chat,
}


def _encode_pieces(tokenizer: Encoder, pieces: Sequence[tuple[str, bool]], ended: bool) -> Example:
    """Encode pieces of text one by one, each with whether it is trained on."""
    parts = [(list(tokenizer.encode(text)), trains) for text, trains in pieces]
    if ended:
        parts.insert(0, (surrounding(tokenizer)[0], False))
        parts.append(([] if tokenizer.eos_id is None else [tokenizer.eos_id], True))
    ids = np.array([i for part, _ in parts for i in part], np.int32)
    trains = np.array([trains for part, trains in parts for _ in part], bool)
    return Example(ids, trains)


def surrounding(tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text, as BERT's [CLS] and [SEP].

    Not every tokenizer with a BOS puts it there.
    """
    whole, plain = (list(tokenizer.encode("a", special=special)) for special in (True, False))
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    return [], []


def chat_pieces(
    messages: Sequence[Mapping[str, Any]], render: Callable[..., str]
) -> list[tuple[str, bool]]:
    """Render a conversation in pieces, each with whether the assistant said it.

    The conversation is rendered before and after each assistant turn: what the turn adds, after
    the generation prompt, is what the assistant says.

    Raises:
      ValueError: a rendering does not start with the previous one, so turns cannot be told apart
        (the template rewrites earlier turns).
    """
    pieces: list[tuple[str, bool]] = []
    known = ""  # rendered so far
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(messages[:i], add_generation_prompt=True) if i else ""
        answered = render(messages[: i + 1], add_generation_prompt=False)
        if not asked.startswith(known) or not answered.startswith(asked):
            raise ValueError(
                f"the chat template rewrites earlier turns at messages[{i}]; give the row as "
                "prompt and completion"
            )
        pieces += [(asked[len(known) :], False), (answered[len(asked) :], True)]
        known = answered
    return [piece for piece in pieces if piece[0]]


def _cut_into_pieces(examples: Sequence[Example], length: int) -> list[Example]:
    """Cut longer texts into pieces; each starts with the last token of the previous one."""
    return [
        Example(example.ids[start : start + length], example.trains[start : start + length])
        for example in examples
        for start in range(0, max(1, len(example) - 1), length - 1)
    ]


def _cut_off(examples: Sequence[Example], length: int) -> list[Example]:
    return [Example(example.ids[:length], example.trains[:length]) for example in examples]


def _keep_trainable(
    rows: Rows, whole: Sequence[Example], cut: Sequence[Example], length: int
) -> Examples:
    """Keep the examples with tokens to train on, and note what was truncated or left out."""
    notes = []
    long = sum(len(example) > length for example in whole)
    if long and rows.kind == "text":
        notes.append(f"{long} of {len(whole)} texts exceed {length} tokens: cut into pieces")
    elif long:
        lost = sum(int(e.trains[length:].sum()) for e in whole)
        notes.append(
            f"{long} of {len(whole)} rows exceed {length} tokens: truncated, which loses {lost:,} "
            f"of {sum(int(e.trains.sum()) for e in whole):,} tokens to train on (see --length)"
        )
    # The first token of a row is never predicted.
    kept = tuple(example for example in cut if example.trains[1:].any())
    if not kept:
        raise DataError(
            f"{rows.source}: no tokens to train on are left in rows of {length} tokens; increase "
            "--length"
        )
    if rows.kind != "text" and len(kept) < len(cut):
        notes.append(
            f"{len(cut) - len(kept)} rows left out: nothing to train on in {length} tokens"
        )
    return Examples(kept, tuple(notes))
