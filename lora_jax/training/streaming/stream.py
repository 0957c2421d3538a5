"""Batches from pieces of files that are read, tokenized and packed while steps run.

Row `i` of every batch comes from lane `i`, and the pieces of an epoch are dealt out to the lanes in
a new order: so a batch mixes rows from as many places as it has rows, times the pieces of a
window, whose rows are packed together and shuffled. All depends on the seed, the size of a batch
and the step, not on how many processes read: each reads the lanes of the rows that its devices get,
and every piece is read and tokenized by one process, once per epoch.

Grain would bring worker processes and a shuffle of indices, but packing makes an unknown number of
rows of each piece, so its samplers have nothing to count; its iterators resume from a state, not
from a step; and their order depends on the number of processes. Threads are enough where tokenizers
encode outside Python's lock, as they do texts.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.training.batching import Batch, Data
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from lora_jax.training.mixing.visits import in_turn, items
from lora_jax.training.rows.fields import UNCHANGED, Fields
from lora_jax.training.streaming.counts import Counts, Key
from lora_jax.training.streaming.pieces import Piece, first_number, read_piece

PIECE = 64 << 10  # bytes of a piece
WINDOW = 4  # pieces that are packed together
_SAMPLES = 8  # pieces by which the rows of an epoch are estimated


@dataclass(frozen=True)
class Window:
    """Pieces that follow one another in a lane."""

    key: Key
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """What turns pieces into rows of tokens.

    Attributes:
      pieces: from `pieces.divide`.
      encode: of the rows of a piece, such as `tokenize.encode_examples`.
      pack: puts what `encode` returned for some pieces into rows.
      encoding: text encoding of the files.
      held_out: fraction of the rows to leave out of training.
      seed: for which rows those are.
      fields: columns that stand for the keys of rows.
      sources: how many pieces each file has, and its weight; () for a weight of 1 everywhere.
      prefer: the kind of rows whose keys are those of several.
    """

    pieces: tuple[Piece, ...]
    encode: Callable[[Rows], Any]
    pack: Callable[[Sequence[Any]], Data | None]
    encoding: str = "utf-8"
    held_out: float = 0.0
    seed: int = 0
    fields: Fields = UNCHANGED
    sources: tuple[tuple[int, float], ...] = ()
    prefer: str | None = None

    @property
    def weights(self) -> list[float]:
        """The weight of each piece."""
        return [w for n, w in self.sources for _ in range(n)] or [1.0] * len(self.pieces)

    def order(self, seed: int | None, epoch: int) -> list[int]:
        """Return the pieces that an epoch visits, in their order."""
        return _order(self.sources or ((len(self.pieces), 1.0),), seed, epoch)

    def read(self, pieces: Iterable[int], held_out: bool = False) -> Data | None:
        """Return the packed rows of some pieces, or None if no text of theirs can be trained on.

        Args:
          pieces: indices.
          held_out: whether to return the rows that are left out of training instead.

        Raises:
          DataError: the rows are damaged, or of another kind than those of the other pieces.
        """
        encoded = (self._encode(index, held_out) for index in pieces)
        found = [x for x in encoded if x is not None]
        return self.pack(found) if found else None

    def _encode(self, index: int, held_out: bool) -> Any | None:
        piece = self.pieces[index]
        try:
            return self._encode_from(piece, index, held_out, None)
        except DataError:
            if piece.first is not None:
                raise
        return self._encode_from(piece, index, held_out, first_number(piece))  # with line numbers

    def _encode_from(self, piece: Piece, index: int, held_out: bool, first: int | None) -> Any:
        rows = read_piece(piece, self.encoding, first, self.fields, self.prefer)
        if rows is not None and rows.kind != self.kind:
            raise DataError(
                f"{rows.source}, {rows.places[0]}: is a {rows.kind} row, but {self.pieces[0].path} "
                f"contains {self.kind} rows; give files of one kind"
            )
        rows = None if rows is None else self._part(rows, index, held_out)
        return None if rows is None else self.encode(rows)

    @cached_property
    def kind(self) -> str:
        """What all rows are: the kind of the first one."""
        for piece in self.pieces:
            rows = read_piece(piece, self.encoding, None, self.fields, self.prefer)
            if rows is not None:
                return rows.kind
        raise DataError("the files of the data are empty")

    def _part(self, rows: Rows, index: int, held_out: bool) -> Rows | None:
        """Return the rows of a piece that are to be trained on, or those that are not."""
        if not self.held_out:
            return rows
        chosen = np.random.default_rng([self.seed, index]).random(len(rows)) < self.held_out
        part: tuple[Row, ...] = tuple(
            row for row, is_held in zip(rows.rows, chosen, strict=True) if is_held == held_out
        )
        return Rows(rows.source, rows.kind, part, rows.ignored, rows.unit) if part else None


@dataclass(frozen=True)
class Stream:
    """Rows to train on that are never in memory all at once.

    Attributes:
      reader: of the pieces.
      directory: of the run, for the counts of rows.
      process: the number of this process.
    """

    reader: Reader
    directory: Path | None = None
    process: int = 0
    _sampled: list[Data] = field(default_factory=list)

    def batches_from(
        self, size: int, seed: int | None, step: int, own: Collection[int] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of a step and of all later ones, without end.

        Args:
          size: rows per batch, and lanes.
          seed: for the order; with None there is one lane, the files in their order.
          step: counted from 0.
          own: the rows that this process needs; the others are empty. None for all.

        Raises:
          DataError: there are fewer pieces than lanes, or rows are damaged.
        """
        rows = sorted(range(size) if own is None else own)
        lanes = 1 if seed is None else size
        if len(self.reader.pieces) < lanes:
            raise DataError(
                f"the data has {len(self.reader.pieces)} parts, too few to read {size} rows at a "
                "time from different ones; leave out --stream"
            )
        counts = Counts(self.directory, self.process)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            if seed is None:
                lane = _Lane(self.reader, counts, 0, 1, None).rows(step * size, pool)
                while True:
                    found = list(itertools.islice(lane, size))
                    yield _lay_out([found[i] for i in rows], rows, size)
            taken = [_Lane(self.reader, counts, i, lanes, seed).rows(step, pool) for i in rows]
            while True:
                yield _lay_out([next(lane) for lane in taken], rows, size)

    def example(self, size: int) -> Batch:
        """Return a batch of empty rows, for its shapes and dtypes."""
        return self._samples()[0].example(size)

    def steps_per_epoch(self, size: int) -> int:
        """Estimate in how many batches all rows are visited once, by some pieces of them."""
        pieces, samples = self.reader.pieces, self._samples()
        read = sum(pieces[i].size for i in _spread(len(pieces)))
        weighted = zip(pieces, self.reader.weights, strict=True)
        whole = sum(piece.size * weight for piece, weight in weighted)
        return max(1, round(sum(map(len, samples)) * whole / max(read, 1) / size))

    def checksum(self) -> str:
        """Return a checksum of the sizes of all pieces, and of the tokens of some of them."""
        digest = hashlib.sha256(b"stream")
        for piece in self.reader.pieces:
            digest.update(f"{piece.start} {piece.stop} {piece.group}".encode())
        if self.reader.sources:
            digest.update(str(self.reader.sources).encode())
        for data in self._samples():
            digest.update(data.checksum().encode())
        return digest.hexdigest()

    def _samples(self) -> list[Data]:
        if not self._sampled:
            indices = _spread(len(self.reader.pieces))
            for start in range(0, len(indices), WINDOW):
                data = self.reader.read(indices[start : start + WINDOW])
                if data is not None:
                    self._sampled.append(data)
            if not self._sampled:
                raise DataError(
                    f"{self.reader.pieces[0].path}: no tokens to train on are in some parts of the "
                    "data; increase --length"
                )
        return self._sampled


def _spread(count: int) -> list[int]:
    """Return the indices of some of `count` pieces, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _SAMPLES))})


def _lay_out(found: Sequence[Batch], rows: Sequence[int], size: int) -> Batch:
    """Return a batch with the rows that were found, and empty ones in the place of others."""
    batch = {}
    for name, x in found[0].items():
        batch[name] = np.zeros((size, *x.shape), x.dtype)
        batch[name][rows] = [row[name] for row in found]
    return batch


@dataclass(frozen=True)
class _Lane:
    """One row of every batch."""

    reader: Reader
    counts: Counts
    number: int
    lanes: int
    seed: int | None

    def windows(self) -> Iterator[Window]:
        """Yield the windows of all epochs."""
        for epoch in itertools.count():
            mine = self.reader.order(self.seed, epoch)[self.number :: self.lanes]
            for number, start in enumerate(range(0, len(mine), WINDOW)):
                yield Window((self.number, epoch, number), tuple(mine[start : start + WINDOW]))

    def rows(self, skip: int, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """Return the rows that follow `skip` others; the next window is packed ahead."""
        windows = self.windows()
        for window in windows:
            count = self.counts.get(window.key)
            if count is None or skip < count:
                return self._from(pool.submit(self._pack, window), windows, skip, pool)
            skip -= count
        raise AssertionError("epochs never end")

    def _from(
        self,
        waiting: Future[Data | None],
        windows: Iterator[Window],
        skip: int,
        pool: ThreadPoolExecutor,
    ) -> Iterator[Batch]:
        empty = 0
        for window in windows:
            waiting, ended = pool.submit(self._pack, window), waiting
            data = ended.result()
            if data is None:
                empty += 1
                if empty > len(self.reader.pieces):
                    raise DataError(f"{self.reader.pieces[0].path}: no tokens to train on are left")
                continue
            for row in range(skip, len(data)):
                yield {name: x[row] for name, x in data.arrays.items()}
            empty, skip = 0, max(0, skip - len(data))

    def _pack(self, window: Window) -> Data | None:
        data = self.reader.read(window.pieces)
        self.counts.set(window.key, len(data) if data else 0)
        if data is None or self.seed is None:
            return data
        order = np.random.default_rng([self.seed, *window.key]).permutation(len(data))
        return Data(dict(data.take(order)))


@lru_cache(maxsize=4)
def _order(sources: tuple[tuple[int, float], ...], seed: int | None, epoch: int) -> list[int]:
    """Return the pieces of an epoch in their order, those of all sources mixed."""
    found, first = [], 0
    for number, (count, weight) in enumerate(sources):
        places = in_turn(count, weight, epoch)
        found.append(first + items(places, count, None if weight == 1 else seed, number))
        first += count
    visited = np.concatenate(found)
    if seed is None:
        return visited.tolist()
    return visited[np.random.default_rng([seed, epoch]).permutation(len(visited))].tolist()


def held_out_rows(reader: Reader, limit: int) -> Data:
    """Return some rows that are left out of training, from places all over the files, in memory.

    Args:
      reader: with a fraction of the rows held out.
      limit: number of rows.

    Raises:
      DataError: there is none.
    """
    order = np.random.default_rng([reader.seed, len(reader.pieces)]).permutation(len(reader.pieces))
    parts: list[Data] = []
    for start in range(0, len(order), WINDOW):
        data = reader.read(order[start : start + WINDOW].tolist(), held_out=True)
        parts += [] if data is None else [data]
        if sum(map(len, parts)) >= limit:
            break
    if not parts:
        raise DataError("no row is held out; choose another --eval-split")
    joined = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    return Data(joined).first(limit)
