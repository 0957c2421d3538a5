"""Rows of tables: comma-separated files and Parquet."""

import csv
import io
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_jax.training.errors import DataError
from lora_jax.training.rows.arrow import errors_of_pyarrow

_DELIMITERS = (",", ";", "\t")


def delimiter(text: str, known: Collection[str]) -> str:
    """Return what stands between the columns of a comma-separated file, judged by its header."""
    first = text.lstrip("\n").partition("\n")[0]
    fits = lambda mark: len({x.strip().strip('"') for x in first.strip().split(mark)} & {*known})
    return max(_DELIMITERS, key=fits)


def read_csv(
    source: str, text: str, known: Collection[str], first: int = 1, label: str = "label"
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a comma-separated file by its header; a label in digits is a number.

    Args:
      source: the file's name, for messages.
      text: its content. Semicolons or tabs between columns are recognized by the header.
      known: names of columns, some of which the header should have.
      first: the number of the first row, for messages.
      label: the name of the column whose digits are numbers.

    Raises:
      DataError: a row has more or fewer columns than the header.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    mark = delimiter(text, known)
    reader = csv.reader(io.StringIO(text.lstrip("\n"), newline=""), delimiter=mark, strict=True)
    try:
        header = next(reader, [])
        for number, fields in enumerate(filter(None, reader), start=first):
            if len(fields) != len(header):
                raise DataError(
                    f"{source}, row {number}: has {len(fields)} columns, but the header has "
                    f"{len(header)}; put text that contains {mark!r} into quotes"
                )
            named = zip((key.strip() for key in header), fields, strict=True)
            yield {key: _value(x) if key == label else x for key, x in named}
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: {error}") from None


def _value(text: str) -> str | int:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file.

    Raises:
      DataError: the file cannot be read, or the package pyarrow is missing.
    """
    with open_parquet(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile` in a block; pyarrow's errors become `DataError`.

    Raises:
      DataError: the file cannot be read, or the package pyarrow is missing.
    """
    with errors_of_pyarrow(path, "Parquet"):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield file
