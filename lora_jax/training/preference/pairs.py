"""Pairs of a chosen and a rejected text as token ids, and rows of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.training.batching import Data
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.encoders import Encoder
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.packing import Assign, assign, lay_out, number_segments
from lora_jax.training.preference.log_probs import REFERENCE, SIDES
from lora_jax.training.tokenize import Example, encode_row
from lora_jax.training.vocabulary import refuse_unknown

KIND = "preference"  # of rows
SLOTS = 64  # maximum pairs per row


@dataclass(frozen=True)
class Pair:
    """Two texts that begin alike; the one is preferred to the other."""

    chosen: Example
    rejected: Example

    @classmethod
    def of(cls, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> "Pair":
        """Return the pair of two completions of a prompt, all given as token ids.

        >>> Pair.of([1, 2], [3], [4, 5]).rejected.trains
        array([False, False,  True,  True])
        """
        one = lambda ids: Example(
            np.array([*prompt, *ids], np.int32), np.arange(len(prompt) + len(ids)) >= len(prompt)
        )
        return cls(one(chosen), one(rejected))

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Pairs:
    """The pairs of a file, each text no longer than a row."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()  # what was truncated or left out, one sentence each


def encode_pairs(
    rows: Rows,
    tokenizer: Encoder,
    length: int,
    *,
    vocabulary: int | None = None,
    may_be_empty: bool = False,
) -> Pairs:
    """Encode rows of preferences, with masks of the tokens of the two completions.

    Both texts of a row are encoded as `encode_examples` encodes a prompt and a completion, or a
    conversation; in a conversation, what the assistant says after the prompt counts. Tokens beyond
    `length` are dropped, and so is a pair with a completion of which nothing is left.

    Args:
      rows: rows of kind "preference".
      tokenizer: turns text into ids.
      length: maximum number of tokens per text, at least 2.
      vocabulary: number of the model's tokens, to refuse ids beyond it.
      may_be_empty: return no pair where none is left.

    Raises:
      DataError: the rows are of another kind, the template refuses a conversation, a token is not
        in the vocabulary, or no pair is left.
    """
    if rows.kind != KIND:
        raise DataError(
            f"{rows.source} has {rows.kind} rows, but preference tuning needs rows of the form "
            '{"prompt": …, "chosen": …, "rejected": …}'
        )
    whole: list[Pair] = []
    problems: list[str] = []
    for row in rows.rows:
        try:
            whole.append(Pair(*(_encode(row, side, tokenizer) for side in ("chosen", "rejected"))))
        except ValueError as error:
            problems.append(f"{rows.unit} {row.line}: {error}")
    if problems:
        raise DataError(f"{rows.source}: rows that cannot be encoded:\n{list_problems(problems)}")
    for side in (lambda pair: pair.chosen.ids, lambda pair: pair.rejected.ids):
        refuse_unknown(rows.source, rows.places, [*map(side, whole)], tokenizer, vocabulary)
    kept = [pair for pair in (_cut(pair, length) for pair in whole) if _has_both(pair)]
    if not kept and not may_be_empty:
        raise DataError(
            f"{rows.source}: no pair has tokens of both completions in {length} tokens; increase "
            "--length"
        )
    return Pairs(tuple(kept), _notes(whole, len(kept), length))


def _encode(row: Row, side: str, tokenizer: Encoder) -> Example:
    values = row.values[side]
    return encode_row(
        "chat" if "messages" in values else "completion", Row(row.line, values), tokenizer
    )


def _cut(pair: Pair, length: int) -> Pair:
    one = lambda text: Example(text.ids[:length], text.trains[:length])
    return Pair(one(pair.chosen), one(pair.rejected))


def _has_both(pair: Pair) -> bool:
    """Return whether both texts have a token to predict, which the first one is not."""
    return bool(pair.chosen.trains[1:].any() and pair.rejected.trains[1:].any())


def _notes(whole: Sequence[Pair], kept: int, length: int) -> tuple[str, ...]:
    notes = []
    long = sum(len(pair) > length for pair in whole)
    if long:
        notes.append(f"{long} of {len(whole)} pairs exceed {length} tokens: truncated")
    if kept < len(whole):
        notes.append(
            f"{len(whole) - kept} pairs left out: a completion has no token in {length} tokens"
        )
    return tuple(notes)


def pack_pairs(
    pairs: Sequence[Pair],
    length: int,
    by: Assign = assign,
    *,
    slots: int = SLOTS,
    reference: bool = False,
) -> Data:
    """Pack pairs into rows of two lines: the chosen texts and the rejected ones.

    A model reads each line as a row of `length` tokens. The texts of one pair have the same number
    in both lines, so a row holds whole pairs and rows can be shared out among devices.

    Args:
      pairs: each text of at most `length + 1` tokens.
      length: tokens that the model reads.
      by: which pairs share a row; `assign_in_order` keeps their order.
      slots: maximum number of pairs per row.
      reference: whether to add "reference" of zeros, for `with_reference` to fill in.

    Returns:
      Data of int32 "ids" and "segments" and float32 "weights" `[rows, 2, length + 1]`, as
      `pack_examples` has them; and float32 "pairs" `[rows, slots]`, 1 where the row has a pair.
    """
    capacity = length + 1
    rows = by([len(pair) for pair in pairs], capacity, min(slots, capacity))
    most = max(map(len, rows))
    there = np.arange(most) < np.array([[len(row)] for row in rows])
    sides = [
        _lay_side(rows, [pair.chosen for pair in pairs], capacity),
        _lay_side(rows, [pair.rejected for pair in pairs], capacity),
    ]
    arrays = {name: np.stack([side[name] for side in sides], axis=1) for name in sides[0]}
    arrays["pairs"] = there.astype(np.float32)
    if reference:
        arrays[REFERENCE] = np.zeros((len(rows), SIDES, most), np.float32)
    return Data(arrays)


def with_slots(parts: Sequence[Data], at_least: int = 0) -> list[Data]:
    """Return rows of pairs with as many slots in each part, so that parts can be joined."""
    most = max(at_least, *(part.arrays["pairs"].shape[-1] for part in parts))
    return [
        Data({n: _fill_slots(x, most) if n in _BY_SLOT else x for n, x in part.arrays.items()})
        for part in parts
    ]


_BY_SLOT = ("pairs", REFERENCE)


def _fill_slots(x: np.ndarray, slots: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, slots - x.shape[-1])])


def _lay_side(
    rows: Sequence[Sequence[int]], texts: Sequence[Example], capacity: int
) -> dict[str, np.ndarray]:
    weights = [text.trains.astype(np.float32) for text in texts]
    for weight in weights:
        weight[0] = 0
    return {
        "ids": lay_out(rows, [text.ids for text in texts], capacity),
        "segments": number_segments(rows, [len(text) for text in texts], capacity),
        "weights": lay_out(rows, weights, capacity),
    }
