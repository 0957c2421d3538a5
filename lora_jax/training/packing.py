"""Packing texts of different lengths into rows of one length.

A row contains several texts, one after the other, as the models in `lora_jax.models` take them.
Compared with one padded row per text this wastes next to nothing, and there is one shape to
compile.
"""

from collections.abc import Callable, Sequence

import numpy as np

#: Which texts share a row, given their lengths, the tokens per row and the most texts per row.
Assign = Callable[[Sequence[int], int, int], list[list[int]]]


def assign(lengths: Sequence[int], capacity: int, slots: int) -> list[list[int]]:
    """Decide which texts share a row, by best-fit decreasing bin packing.

    Longest first, each text goes to the row whose free space it fills best.

    Args:
      lengths: tokens of each text.
      capacity: tokens per row.
      slots: maximum number of texts per row.

    Returns:
      The indices of the texts in each row.

    Raises:
      ValueError: a text is empty or longer than a row.
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
    """Decide which texts share a row, in their order; this fills rows less well than `assign`.

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
            raise ValueError(f"text {text} has {length} tokens, but a row takes 1 to {capacity}")


def lay_out(
    rows: Sequence[Sequence[int]], texts: Sequence[np.ndarray], capacity: int
) -> np.ndarray:
    """Lay one value per token into rows.

    Args:
      rows: the indices of the texts in each row, from `assign`.
      texts: the values of each text, `[length]`, all of one dtype.
      capacity: tokens per row.

    Returns:
      `[rows, capacity]` of the texts' dtype, 0 after the last text of a row.
    """
    laid = np.zeros((len(rows), capacity), texts[0].dtype if len(texts) else np.int32)
    for row, indices in zip(laid, rows, strict=True):
        flat = np.concatenate([texts[i] for i in indices])
        row[: len(flat)] = flat
    return laid


def number_segments(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int
) -> np.ndarray:
    """Return int32 `[rows, capacity]`: 1, 2, ... for the texts of each row, 0 at padding.

    >>> number_segments([[0, 2], [1]], [2, 4, 1], capacity=4)
    array([[1, 1, 2, 0],
           [1, 1, 1, 1]], dtype=int32)
    """
    place = {text: slot for row in rows for slot, text in enumerate(row)}
    numbers = [np.full(length, place[i] + 1, np.int32) for i, length in enumerate(lengths)]
    return lay_out(rows, numbers, capacity)


def number_sources(rows: Sequence[Sequence[int]], slots: int) -> np.ndarray:
    """Return int32 `[rows, slots]`: which text segment i + 1 of each row is, -1 for none.

    >>> number_sources([[0, 2], [1]], slots=3)
    array([[ 0,  2, -1],
           [ 1, -1, -1]], dtype=int32)
    """
    source = np.full((len(rows), slots), -1, np.int32)
    for row, texts in zip(source, rows, strict=True):
        row[: len(texts)] = texts
    return source
