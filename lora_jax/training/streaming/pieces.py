"""Pieces of files, each a few rows that follow one another, found without reading the files whole.

Lines of JSON and texts are divided at the first end of a line after every so many bytes, so nothing
but those places is read. A comma-separated file is read through once, since a quoted field may
contain an end of line. A piece of a Parquet file is a slice of a row group. A compressed file is
decompressed once, onto the disk.
"""

import csv
import dataclasses
import io
import itertools
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lora_jax.training.dataset import KNOWN, STREAM, Row, Rows, collect, decode, read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.rows.arrow import read_slice, size_of
from lora_jax.training.rows.compressed import on_disk, suffixes
from lora_jax.training.rows.fields import UNCHANGED, Fields
from lora_jax.training.rows.tables import delimiter, open_parquet, read_csv

_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_BLOCK = 1 << 20
_LARGEST_JSON = 64 << 20  # bytes of a .json file, which has to be read whole


@dataclass(frozen=True)
class Piece:
    """Some rows of a file.

    Attributes:
      path: the file, for messages.
      start, stop: its bytes; of a Parquet file, rows of the row group; of an Arrow file, rows.
      size: bytes, of a Parquet file estimated.
      first: the number of the first row, counted from 1; None if it has to be counted.
      header: bytes of a comma-separated file's header.
      group: the row group of a Parquet file.
      decompressed: a copy of a compressed file, which is read in its place.
    """

    path: Path
    start: int
    stop: int
    size: int
    first: int | None = None
    header: int = 0
    group: int = 0
    decompressed: Path | None = None

    @property
    def stored(self) -> Path:
        """Where the bytes are."""
        return self.decompressed or self.path


def divide(
    files: Sequence[Path], size: int, encoding: str = "utf-8", fields: Fields = UNCHANGED
) -> tuple[Piece, ...]:
    """Divide files into pieces of about `size` bytes, each of whole rows.

    Raises:
      DataError: a file cannot be read, or not in pieces.
    """
    if "\n".encode(encoding) != b"\n":
        raise DataError(f"files in {encoding} cannot be streamed; convert them to utf-8")
    try:
        return tuple(piece for file in files for piece in _divide(file, size, encoding, fields))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None


def _divide(path: Path, size: int, encoding: str, fields: Fields) -> Iterator[Piece]:
    kind, compression = suffixes(path)
    if compression and kind in (*_LINES, *_TABLES, ".txt"):
        copy = on_disk(path)
        try:
            for piece in _divide(copy, size, encoding, fields):
                yield dataclasses.replace(piece, path=path, decompressed=copy)
        except DataError as error:
            raise DataError(str(error).replace(str(copy), str(path))) from None
        return
    if compression and kind != ".json":
        read_rows(path, encoding)  # which says that it cannot be read
    whole = path.stat().st_size
    if kind == ".parquet":
        yield from _of_parquet(path, size)
    elif kind == ".arrow":
        yield from _of_arrow(path, size)
    elif kind in _TABLES:
        yield from _of_table(path, size, fields)
    elif kind in (*_LINES, ".txt"):
        cuts = [0, *_line_ends(path, size, whole), whole]
        for start, stop in itertools.pairwise(cuts):
            yield Piece(path, start, stop, stop - start, first=None if start else 1)
    elif kind != ".json":
        read_rows(path, encoding)  # which says that it cannot be read
    elif whole > _LARGEST_JSON:
        raise DataError(f"{path}: a file of this type cannot be streamed; convert it to .jsonl")
    else:
        yield Piece(path, 0, whole, whole, first=1)


def _line_ends(path: Path, size: int, whole: int) -> Iterator[int]:
    """Yield where lines end, the first end after every `size` bytes."""
    with path.open("rb") as file:
        end = 0
        while end + size < whole:
            file.seek(end + size)
            while (line := file.readline(_BLOCK)) and not line.endswith(b"\n"):
                pass
            end = file.tell()
            if end < whole:
                yield end


def _of_table(path: Path, size: int, fields: Fields) -> Iterator[Piece]:
    with path.open("rb") as file:
        read = 0

        def lines() -> Iterator[str]:
            nonlocal read
            for raw in file:
                for line in io.StringIO(raw.decode("latin-1"), newline=""):  # a byte a character
                    read += len(line)
                    yield line

        head = file.read(_BLOCK).removeprefix(BOM_UTF8).decode("latin-1")
        mark = delimiter(head, KNOWN | fields.names)
        file.seek(0)
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(lines(), delimiter=mark)
        rows = filter(None, reader)
        try:
            next(rows, None)
            header = start = read
            first, number = 1, 0
            for number, _ in enumerate(rows, start=1):
                if read - start >= size:
                    yield Piece(path, start, read, read - start, first, header)
                    start, first = read, number + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from None
        if number >= first:
            yield Piece(path, start, read, read - start, first, header)


def _of_parquet(path: Path, size: int) -> Iterator[Piece]:
    with open_parquet(path) as file:
        metadata = file.metadata
    first = 1
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        rows = found.num_rows
        parts = min(rows, max(1, round(found.total_byte_size / size)))
        cuts = [rows * i // max(parts, 1) for i in range(parts + 1)]
        for start, stop in itertools.pairwise(cuts):
            share = found.total_byte_size * (stop - start) // rows
            yield Piece(path, start, stop, share, first + start, group=group)
        first += rows


def _of_arrow(path: Path, size: int) -> Iterator[Piece]:
    rows, whole = size_of(path)
    parts = min(rows, max(1, round(whole / size)))
    for start, stop in itertools.pairwise(rows * i // max(parts, 1) for i in range(parts + 1)):
        yield Piece(path, start, stop, whole * (stop - start) // rows, start + 1)


def read_piece(
    piece: Piece,
    encoding: str,
    first: int | None = None,
    fields: Fields = UNCHANGED,
    prefer: str | None = None,
) -> Rows | None:
    """Return the rows of a piece, or None if all its lines are blank.

    Args:
      piece: from `divide`.
      encoding: text encoding of the file.
      first: the number of the first row, if the piece does not have it.
      fields: columns that stand for the keys of rows.
      prefer: the kind of rows whose keys are those of several.

    Raises:
      DataError: as `dataset.read_rows`, with numbers that begin at `first` or else at 1.
    """
    path, kind = piece.path, suffixes(piece.path)[0]
    make = partial(collect, fields=fields, prefer=prefer)
    first = piece.first or first or 1
    if kind == ".parquet":
        values = _row_group(path, piece.group).slice(piece.start, piece.stop - piece.start)
        return make(str(path), "row", enumerate(values.to_pylist(), start=first))
    if kind == ".arrow":
        found = read_slice(path, piece.start, piece.stop)
        return make(str(path), "row", enumerate(found, start=first))
    if kind == ".json":
        return read_rows(path, encoding, fields, prefer)
    text = decode(path, _bytes(piece, piece.start, piece.stop), encoding, piece.start, first)
    if kind in _TABLES:
        header = decode(path, _bytes(piece, 0, piece.header), encoding)
        known, label = KNOWN | fields.names, fields.column("label")
        lines = read_csv(str(path), header + text, known, first, label)
        return make(str(path), "row", enumerate(lines, start=first))
    if not text.strip():
        return None
    if kind == ".txt":
        return Rows(str(path), STREAM, (Row(first, {"text": text}),))
    numbered = enumerate(text.split("\n"), start=first)
    return make(str(path), "line", ((n, line) for n, line in numbered if line.strip()))


def _bytes(piece: Piece, start: int, stop: int) -> bytes:
    try:
        with piece.stored.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    except OSError as error:
        raise DataError(f"cannot read {piece.stored}: {error.strerror}") from None


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int) -> Any:
    with open_parquet(path) as file:
        return file.read_row_group(group)


def first_number(piece: Piece) -> int:
    """Count which line of its file a piece begins with."""
    with piece.stored.open("rb") as file:
        lines, left = 1, piece.start
        while left > 0:
            block = file.read(min(left, _BLOCK))
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines
