"""Packing texts of different lengths into rows of one length.

Rows hold several texts, one behind the other, as the models of `lora_jax.models` take them.
Compared with a padded row for each text this wastes next to nothing, and there is one shape to
compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

#: Which texts share a row, given their lengths, a row's tokens and its most texts.
Assign = Callable[[Sequence[int], int, int], list[list[int]]]


@dataclass(frozen=True)
class Packed:
    """Rows of packed texts."""

    ids: np.ndarray  # int32 [rows, length]: token ids, 0 at padding
    segments: np.ndarray  # int32 [rows, length]: 1, 2, ... for the row's texts, 0 at padding
    source: np.ndarray  # int32 [rows, slots]: which text segment i + 1 is; -1 for none

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Packed:
        """The rows at integer indices `rows` `[m]`; an index of -1 gives an empty row."""
        empty = rows < 0
        fill = (0, 0, -1)
        fields = (self.ids[rows], self.segments[rows], self.source[rows])
        return Packed(
            *(np.where(empty[:, None], value, x) for value, x in zip(fill, fields, strict=True))
        )


def assign(lengths: Sequence[int], capacity: int, slots: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: which texts share a row.

    Longest first, each text goes to the row whose free space it fills best.

    Args:
      lengths: tokens of each text.
      capacity: tokens a row holds.
      slots: texts a row holds at most.

    Returns:
      For each row, the indices of its texts.

    Raises:
      ValueError: when a text is empty or longer than a row.
    """
    _refuse_unfit(lengths, capacity)
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[text]
        space = next((s for s in range(length, capacity + 1) if open_rows[s]), None)
        if space is None:
            space, row = capacity, len(rows)
            rows.append([])
        else:
            row = open_rows[space].pop()
        rows[row].append(text)
        if len(rows[row]) < slots:
            open_rows[space - length].append(row)
    return rows


def assign_in_order(lengths: Sequence[int], capacity: int, slots: int) -> list[list[int]]:
    """Next-fit packing, which keeps the texts' order and fills the rows less well than `assign`.

    >>> assign_in_order([2, 1, 2, 3], capacity=4, slots=8)
    [[0, 1], [2], [3]]
    """
    _refuse_unfit(lengths, capacity)
    rows: list[list[int]] = []
    space = 0
    for text, length in enumerate(lengths):
        if length > space or len(rows[-1]) == slots:
            rows.append([])
            space = capacity
        rows[-1].append(text)
        space -= length
    return rows


def _refuse_unfit(lengths: Sequence[int], capacity: int) -> None:
    for text, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"text {text} has {length} tokens; a row holds 1 to {capacity}")


def lay_out(
    rows: Sequence[Sequence[int]], texts: Sequence[np.ndarray], capacity: int
) -> np.ndarray:
    """One value for each token, laid into rows as `assign` shares them out.

    Args:
      rows: for each row, the indices of its texts.
      texts: the values of each text, `[length]`, all of one dtype.
      capacity: tokens a row holds.

    Returns:
      `[rows, capacity]` of the texts' dtype, 0 behind the last text of a row.
    """
    laid = np.zeros((len(rows), capacity), texts[0].dtype if len(texts) else np.int32)
    for row, indices in zip(laid, rows, strict=True):
        flat = np.concatenate([texts[i] for i in indices])
        row[: len(flat)] = flat
    return laid


def number_segments(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int
) -> np.ndarray:
    """int32 `[rows, capacity]`: 1, 2, ... for the texts of each row, 0 at padding.

    >>> number_segments([[0, 2], [1]], [2, 4, 1], capacity=4)
    array([[1, 1, 2, 0],
           [1, 1, 1, 1]], dtype=int32)
    """
    place = {text: slot for row in rows for slot, text in enumerate(row)}
    numbers = [np.full(length, place[i] + 1, np.int32) for i, length in enumerate(lengths)]
    return lay_out(rows, numbers, capacity)


def pack(tokens: Sequence[np.ndarray], capacity: int, slots: int, by: Assign = assign) -> Packed:
    """Packs texts, given as int32 token ids `[length]` each, into rows of `capacity` tokens."""
    lengths = [len(text) for text in tokens]
    rows = by(lengths, capacity, slots)
    source = np.full((len(rows), slots), -1, np.int32)
    for row, texts in zip(source, rows, strict=True):
        row[: len(texts)] = texts
    return Packed(lay_out(rows, tokens, capacity), number_segments(rows, lengths, capacity), source)


def batches(packed: Packed, size: int) -> Iterator[Packed]:
    """All rows in order, `size` at a time; empty rows fill the last batch up."""
    for start in range(0, len(packed), size):
        rows = np.arange(start, start + size)
        yield packed.take(np.where(rows < len(packed), rows, -1))


def shuffled_batches(packed: Packed, size: int, seed: int) -> Iterator[Packed]:
    """Endless batches of `size` rows, in a new order each time round, without empty rows."""
    rng = np.random.default_rng(seed)
    if size > len(packed):
        raise ValueError(f"a batch of {size} rows was asked for; there are {len(packed)} rows")
    while True:
        order = rng.permutation(len(packed))
        for start in range(0, len(packed) - size + 1, size):
            yield packed.take(order[start : start + size])
