"""Rows of packed tokens, and batches of them in an order that depends on seed and step alone."""

import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lora_jax.training.packing import Assign, assign, lay_out, number_segments, number_sources
from lora_jax.training.tokenize import Example

Batch = Mapping[str, np.ndarray]


class Source(Protocol):
    """Rows to train on: `Data`, which is in memory, or `streaming.stream.Stream`."""

    def batches_from(
        self, size: int, seed: int | None, step: int, own: Collection[int] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of a step and of all later ones, without end.

        Args:
          size: rows per batch.
          seed: for the order of the rows; None for the order of the files.
          step: counted from 0.
          own: the rows of each batch that this process needs; others may be empty. None for all.
        """

    def example(self, size: int) -> Batch:
        """Return a batch for its shapes and dtypes, which all batches share."""

    def steps_per_epoch(self, size: int) -> int:
        """Return in how many batches all rows are visited once, if need be an estimate."""

    def checksum(self) -> str:
        """Return a checksum that tells this data from other data."""


@dataclass(frozen=True)
class Data:
    """Rows as arrays. A row of zeros is empty and contributes nothing to a loss."""

    arrays: Batch  # each [rows, ...]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches_from(
        self, size: int, seed: int | None, step: int, own: Collection[int] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of a step and of all later ones, without end, as `batch_of_step` does.

        Args:
          own: which rows of a batch are needed; all are given.
        """
        per_epoch = self.steps_per_epoch(size)
        first, place = divmod(step, per_epoch)
        for epoch in itertools.count(first):
            order = self.order(seed, epoch)
            for start in range(place * size, len(order), size):
                yield self.take(_fill_up(order[start : start + size], size))
            place = 0

    @property
    def visited(self) -> int:
        """How many rows an epoch visits."""
        return len(self)

    def order(self, seed: int | None, epoch: int) -> np.ndarray:
        """Return the rows of an epoch as integers; without a seed in the order that they have."""
        if seed is None:
            return np.arange(len(self))
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def example(self, size: int) -> Batch:
        """Return a batch of empty rows, for its shapes and dtypes."""
        return {name: np.zeros((size, *x.shape[1:]), x.dtype) for name, x in self.arrays.items()}

    def steps_per_epoch(self, size: int) -> int:
        """Return how many batches of `size` rows contain all rows."""
        return steps_per_epoch(self.visited, size)

    def checksum(self) -> str:
        """Return a checksum of all values."""
        digest = hashlib.sha256()
        for name, x in sorted(self.arrays.items()):
            digest.update(f"{name} {x.dtype} {x.shape}".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def first(self, count: int) -> "Data":
        """Return the first `count` rows, or all if there are fewer."""
        return Data({name: x[:count] for name, x in self.arrays.items()})

    def take(self, rows: np.ndarray) -> Batch:
        """Return the rows at integer indices `[m]`; an index of -1 gives an empty row."""
        there = rows >= 0
        taken = {name: x[rows] for name, x in self.arrays.items()}
        return {
            name: np.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, np.zeros((), x.dtype))
            for name, x in taken.items()
        }


def pack_examples(examples: Sequence[Example], length: int, by: Assign = assign) -> Data:
    """Pack examples into rows, for a language model that reads `length` tokens per row.

    A row has one more token than the model reads: the last one is only predicted.

    Args:
      examples: each of at most `length + 1` tokens.
      by: which examples share a row; `assign_in_order` keeps their order.

    Returns:
      Data of int32 "ids" and "segments" `[rows, length + 1]` (1, 2, ... for a row's texts, 0 at
      padding) and float32 "weights" of the same shape: 1 where the token is to be predicted from
      those before it in its segment, which the first token of a segment never is.
    """
    lengths = [len(example) for example in examples]
    capacity = length + 1
    rows = by(lengths, capacity, capacity)
    weights = [example.trains.astype(np.float32) for example in examples]
    for weight in weights:
        weight[0] = 0
    return Data(
        {
            "ids": lay_out(rows, [example.ids for example in examples], capacity),
            "segments": number_segments(rows, lengths, capacity),
            "weights": lay_out(rows, weights, capacity),
        }
    )


def cut_stream(ids: np.ndarray, length: int) -> Data:
    """Cut one stream of token ids into rows that predict `length` tokens each.

    Each row starts with the last token of the previous row, so every token but the first is
    predicted once. The last row is padded.

    Args:
      ids: int32 `[n]`, n at least 2.

    Returns:
      Data as `pack_examples` returns it.

    >>> cut_stream(np.arange(1, 7, dtype=np.int32), length=2).arrays["ids"]
    array([[1, 2, 3],
           [3, 4, 5],
           [5, 6, 0]], dtype=int32)
    """
    starts = range(0, len(ids) - 1, length)
    pieces = [ids[start : start + length + 1] for start in starts]
    every = [np.ones(len(piece), bool) for piece in pieces]
    laid = {"ids": pieces, "segments": [e.astype(np.int32) for e in every]}
    rows = [[i] for i in range(len(pieces))]
    weights = lay_out(rows, [e.astype(np.float32) for e in every], length + 1)
    weights[:, 0] = 0
    return Data(
        {**{name: lay_out(rows, x, length + 1) for name, x in laid.items()}, "weights": weights}
    )


def cut_streams(streams: Sequence[np.ndarray], length: int) -> Data:
    """Cut several streams as `cut_stream` does, one after the other."""
    parts = [cut_stream(ids, length).arrays for ids in streams]
    return Data({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def pack_texts(texts: Sequence[np.ndarray], length: int, slots: int, by: Assign = assign) -> Data:
    """Pack texts into rows of `length` tokens, for a model that gives each text one output.

    Args:
      texts: int32 token ids `[n]` of each text, n at most `length`.
      slots: maximum number of texts per row.
      by: which texts share a row; `assign_in_order` keeps their order.

    Returns:
      Data of int32 "ids" and "segments" `[rows, length]`, int32 "source" `[rows, slots]` (which
      text segment i + 1 is) and float32 "weights" `[rows, slots]`, 1 where the row has such a
      segment. Where it has none, the source means nothing.
    """
    lengths = [len(text) for text in texts]
    rows = by(lengths, length, slots)
    source = number_sources(rows, slots)
    return Data(
        {
            "ids": lay_out(rows, texts, length),
            "segments": number_segments(rows, lengths, length),
            "source": source,
            "weights": (source >= 0).astype(np.float32),
        }
    )


def pack_labelled(
    texts: Sequence[np.ndarray],
    labels: Sequence[int],
    length: int,
    slots: int,
    by: Assign = assign,
) -> Data:
    """Pack labelled texts into rows of `length` tokens, for a classifier.

    Args:
      texts: int32 token ids `[n]` of each text, n at most `length`.
      labels: the class of each text.
      slots: maximum number of texts per row.
      by: which texts share a row; `assign_in_order` keeps their order.

    Returns:
      Data of int32 "ids" and "segments" `[rows, length]`, int32 "labels" `[rows, slots]` and
      float32 "weights" `[rows, slots]`, 1 where the row has such a segment.
    """
    return add_labels(pack_texts(texts, length, slots, by), labels)


def add_labels(texts: Data, labels: Sequence[int]) -> Data:
    """Return packed texts with their labels, as `pack_labelled` does.

    Args:
      texts: from `pack_texts`.
      labels: the class of each text, in the order in which the texts were given.
    """
    arrays = texts.arrays
    there = arrays["weights"] > 0
    return Data(
        {
            "ids": arrays["ids"],
            "segments": arrays["segments"],
            "labels": np.where(there, np.asarray(labels, np.int32)[arrays["source"]], 0),
            "weights": arrays["weights"],
        }
    )


def steps_per_epoch(rows: int, size: int) -> int:
    """Return how many batches of `size` rows contain all `rows`."""
    return math.ceil(rows / size)


def batch_of_step(data: Data, size: int, seed: int | None, step: int) -> Batch:
    """Return the `size` rows of one training step, which depend on seed and step alone.

    Each epoch visits every row once, in a new order; empty rows fill up its last batch.

    Args:
      seed: random seed for the order; with None every epoch takes the rows as they stand.
      step: counted from 0.
    """
    return next(data.batches_from(size, seed, step))


def batches(data: Data, size: int) -> Iterator[Batch]:
    """Yield all rows in order, `size` at a time; empty rows fill up the last batch."""
    for start in range(0, len(data), size):
        yield data.take(_fill_up(np.arange(start, min(start + size, len(data))), size))


def _fill_up(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.full(size - len(rows), -1, rows.dtype)])


def hold_out(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the examples to train on and those to hold out, and return their indices, ascending.

    Raises:
      ValueError: one of the two parts would be empty.

    >>> [part.tolist() for part in hold_out(5, 0.4, seed=0)]
    [[1, 2, 4], [0, 3]]
    """
    held = round(count * share)
    if not 0 < held < count:
        raise ValueError(f"holding out {share} of {count} examples leaves one part empty")
    order = np.random.default_rng([seed, count]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
