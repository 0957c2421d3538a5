"""Rows as token ids, with a mask of those to train on: prompts and user turns are not."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np

from lora_jax.training.dataset import STREAM, Row, Rows
from lora_jax.training.encoders import BatchEncoder, Encoded, Encoder, SpanEncoder, surrounding
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.turns import Span, assistant_spans
from lora_jax.training.vocabulary import refuse_unknown


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


def encode_examples(
    rows: Rows,
    tokenizer: Encoder,
    length: int,
    *,
    vocabulary: int | None = None,
    stops: Collection[int] | None = None,
    may_be_empty: bool = False,
    mask_prompts: bool = True,
) -> Examples:
    """Encode the rows of a language model's data, with masks of the tokens to train on.

    - text: BOS (if the tokenizer itself puts one before a text), the text, EOS; all of it is
      trained on. A text longer than `length` is cut into pieces that train as separate texts.
    - prompt and completion: encoded as one text, after BOS and before EOS; the completion and EOS
      are trained on. A token that would hold the end of the prompt and the beginning of the
      completion is divided there, because generation starts from the ids of the prompt alone.
      Tokens beyond `length` are dropped.
    - chat: rendered by the tokenizer's template and encoded as one text; what the assistant says
      is trained on, as the template's `{% generation %}` blocks or else the ends of its turns tell.
      A token trains if one of its characters does. Tokens beyond `length` are dropped. For a
      tokenizer without a template, rows with Alpaca's keys are a prompt and a completion.

    A BOS or EOS that the data itself spells out is not repeated.

    Args:
      rows: rows of kind "text", "completion" or "chat".
      tokenizer: turns text into ids.
      length: maximum number of tokens per example, at least 2.
      vocabulary: number of the model's tokens, to refuse ids beyond it.
      stops: the ids at which generation ends, to note if none of them is trained on.
      may_be_empty: whether no example may be left, as in a part of a file.
      mask_prompts: whether prompts and other turns than the assistant's are not trained on; without
        it all tokens of a row are.

    Raises:
      DataError: the rows are of another kind, the template refuses a conversation or leaves out
        one of its turns, a token is not in the vocabulary, or no tokens are left to train on.
    """
    if rows.kind not in _ENCODERS:
        raise DataError(
            f"{rows.source}: a language model cannot be trained on {rows.kind} rows; "
            f"{_OTHER_TASKS.get(rows.kind, '')}"
        )
    encoded: list[Example] = []
    problems: list[str] = []
    for start in range(0, len(rows), _TOGETHER):
        some = rows.rows[start : start + _TOGETHER]
        known = _encode_together(rows.kind, some, tokenizer)
        for row in some:
            try:
                encoded.append(_ENCODERS[rows.kind](row, known))
            except ValueError as error:
                problems.append(f"{rows.unit} {row.line}: {error}")
    if problems:
        raise DataError(f"{rows.source}: rows that cannot be encoded:\n{list_problems(problems)}")
    if not mask_prompts:
        encoded = [Example(e.ids, np.ones_like(e.trains)) for e in encoded]
    refuse_unknown(rows.source, rows.places, [e.ids for e in encoded], tokenizer, vocabulary)
    fit = _cut_into_pieces if rows.kind == "text" else _cut_off
    kept = _keep_trainable(rows, encoded, fit(encoded, length), length)
    if not kept.examples and not may_be_empty:
        raise DataError(
            f"{rows.source}: no tokens to train on are left in rows of {length} tokens; increase "
            "--length"
        )
    notes = (*kept.notes, *_note_stops(rows, encoded, stops), *_note_unwritten(rows, tokenizer))
    return Examples(kept.examples, notes)


def encode_stream(
    rows: Rows, tokenizer: Encoder, *, vocabulary: int | None = None, may_be_empty: bool = False
) -> np.ndarray:
    """Return the token ids of a `.txt` file, int32 `[n]`, without BOS or EOS.

    Args:
      rows: of kind `STREAM`.
      tokenizer: turns text into ids.
      vocabulary: number of the model's tokens, to refuse ids beyond it.
      may_be_empty: whether there may be a single token or none, as in a part of a file.

    Raises:
      DataError: the text is a single token, so there is nothing to predict, or has a token that
        is not in the vocabulary.
    """
    assert rows.kind == STREAM
    text = rows.rows[0].values["text"]
    if isinstance(tokenizer, BatchEncoder):  # outside Python's lock
        (found,) = tokenizer.encode_batch([text])
    else:
        found = tokenizer.encode(text)
    ids = np.asarray(found, np.int32)
    if len(ids) < 2 and not may_be_empty:
        raise DataError(f"{rows.source}: the text is a single token; there is nothing to train on")
    if vocabulary is not None:
        place = f"token {int(np.argmax(ids >= vocabulary)) + 1}"
        refuse_unknown(rows.source, [place], [ids], tokenizer, vocabulary)
    return ids


_OTHER_TASKS = {
    "label": "use --task classification, or remove the labels",
    "preference": "use --task dpo or --task orpo",
    "choice": "measure its choices with 'lora-jax eval'",
}
_TOGETHER = 64  # texts that are encoded at once


def _encode_together(kind: str, rows: Sequence[Row], tokenizer: Encoder) -> Encoder:
    """Return a tokenizer that has encoded all texts already, if it can on several threads.

    It does that outside Python's lock, so a step can be dispatched meanwhile.
    """
    if kind != "text" or not isinstance(tokenizer, BatchEncoder):
        return tokenizer
    texts = [row.values["text"] for row in rows]
    try:
        return Encoded(tokenizer, dict(zip(texts, tokenizer.encode_batch(texts), strict=True)))
    except ValueError:  # encoding row by row tells which one it is
        return tokenizer


def _encode_text(row: Row, tokenizer: Encoder) -> Example:
    ids = list(tokenizer.encode(row.values["text"]))
    before = surrounding(tokenizer)[0]
    return _example([] if ids[: len(before)] == before else before, _ended(ids, tokenizer))


def _encode_completion(row: Row, tokenizer: Encoder) -> Example:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(tokenizer, SpanEncoder):
        asked, rest = tokenizer.encode_continued(prompt, completion)
    else:
        asked, rest = tokenizer.encode(prompt), tokenizer.encode(completion)
        asked = [*surrounding(tokenizer)[0], *asked]
    return _example(asked, _ended(rest, tokenizer))


def _ended(ids: Sequence[int], tokenizer: Encoder) -> list[int]:
    """Append EOS, unless the text ends with it, or with it and spaces."""
    eos = tokenizer.eos_id
    if eos is None:
        return [*ids]
    after = list(ids)[::-1].index(eos) if eos in ids else None
    decode = getattr(tokenizer, "decode", None)
    is_ended = after == 0 or (after and decode and not decode([*ids][-after:], True).strip())
    return [*ids] if is_ended else [*ids, eos]


def _example(given: Sequence[int], trained: Sequence[int]) -> Example:
    trains = np.arange(len(given) + len(trained)) >= len(given)
    return Example(np.array([*given, *trained], np.int32), trains)


def _encode_chat(row: Row, tokenizer: Encoder) -> Example:
    """Encode a conversation; the template writes BOS and the ends of turns.

    The first "given" messages, if any, are a prompt, which does not train.
    """
    if "prompt" in row.values and getattr(tokenizer, "chat_template", "") is None:
        return _encode_completion(row, tokenizer)
    messages = row.values["messages"]
    more = {"tools": row.values["tools"]} if row.values.get("tools") else {}
    is_turn = [message["role"] == "assistant" for message in messages]
    given = sum(is_turn[: row.values.get("given", 0)])
    spans: list[Span] = []
    if isinstance(tokenizer, SpanEncoder):
        last = max(i for i, x in enumerate(messages) if x["role"] == "assistant")
        text, spans = tokenizer.chat_spans(messages[: last + 1], **more)
    if not spans or (given and len(spans) != sum(is_turn)):  # which turn is whose is not known
        text, spans = assistant_spans(messages, partial(tokenizer.chat, **more))
    return _encode_spans(text, spans[given:], tokenizer)


def encode_row(kind: str, row: Row, tokenizer: Encoder) -> Example:
    """Encode one row of a kind that `encode_examples` takes, whole.

    Raises:
      ValueError: the chat template refuses the conversation, or leaves out one of its turns.
    """
    return _ENCODERS[kind](row, tokenizer)


_ENCODERS: Mapping[str, Callable[[Row, Encoder], Example]] = {
    "text": _encode_text,
    "completion": _encode_completion,
    "chat": _encode_chat,
}


def _encode_spans(text: str, spans: Sequence[Span], tokenizer: Encoder) -> Example:
    """Encode a text; the tokens with characters in one of the spans are trained on."""
    if isinstance(tokenizer, SpanEncoder):
        ids, places = tokenizer.encode_spans(text)
        flat = np.fromiter(chain.from_iterable(places), np.int64, 2 * len(places))
        starts, ends = flat.reshape(-1, 2).T
        trains = np.zeros(len(ids), bool)
        for start, end in spans:
            trains |= (starts < end) & (ends > start)
        return Example(np.asarray(ids, np.int32), trains)
    cuts = [0, *(place for span in spans for place in span), len(text)]
    parts = [list(tokenizer.encode(text[a:b])) for a, b in pairwise(cuts)]
    trained = [i % 2 == 1 for i, part in enumerate(parts) for _ in part]
    return Example(np.array([i for part in parts for i in part], np.int32), np.array(trained, bool))


def _note_stops(
    rows: Rows, examples: Sequence[Example], stops: Collection[int] | None
) -> tuple[str, ...]:
    """Say so if nothing in the data teaches the model to stop."""
    if stops is None or rows.kind == "text":
        return ()
    ends = list(stops)
    if any(np.isin(example.ids[example.trains], ends).any() for example in examples):
        return ()
    why = (
        "the chat template writes none at the end of the assistant's turn"
        if rows.kind == "chat"
        else "the tokenizer has no end-of-text token"
    )
    return (
        f"no stop token is trained on, because {why}: the tuned model will not learn where to stop",
    )


def _note_unwritten(rows: Rows, tokenizer: Encoder) -> tuple[str, ...]:
    """Say so if the rows have tools, or calls of them, that the chat template never writes."""
    template = getattr(tokenizer, "chat_template", None)
    if rows.kind != "chat" or template is None:
        return ()
    template += getattr(tokenizer, "tool_template", None) or ""
    found = {
        "tools": any("tools" in row.values for row in rows.rows),
        "tool_calls": any("tool_calls" in x for row in rows.rows for x in row.values["messages"]),
    }
    missing = [name for name, there in found.items() if there and name not in template]
    what = " and ".join(missing)
    return (f"the chat template does not write {what}, so they are left out",) if missing else ()


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
    if rows.kind != "text" and len(kept) < len(cut):
        notes.append(
            f"{len(cut) - len(kept)} rows left out: nothing to train on in {length} tokens"
        )
    return Examples(kept, tuple(notes))
