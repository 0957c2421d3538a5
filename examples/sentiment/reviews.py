"""Movie review snippets with human ratings, as labelled rows.

The snippets are those of Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment
analysis of social media text" (ICWSM 2014), each rated by some twenty people from -4 to 4.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_jax.training import DataError, Row, Rows

LABELS = (0, 1)  # a negative review, a positive one
SEPARATOR = "\t"


def read(path: str | Path, threshold: float = 0.5) -> Rows:
    """Parse a file of `number <tab> mean rating <tab> text` lines.

    Args:
      path: the file. Lines that are not UTF-8 are read as latin-1.
      threshold: snippets rated nearer to zero than this are left out as neither good nor bad.

    Returns:
      The snippets in the file's order, with one of `LABELS`. A text that occurs twice (whatever
      its case) is kept once, so that no split can put it on both sides.

    Raises:
      DataError: a line does not have these three fields; the message gives its number.
    """
    found: dict[str, tuple[Row, float]] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            _, rating, text = _decode(line).split(SEPARATOR)
            row = Row(number, {"text": text.strip(), "label": int(float(rating) > 0)})
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not 'number, rating, text'") from error
        found.setdefault(text.strip().lower(), (row, float(rating)))
    clear = tuple(row for row, rating in found.values() if abs(rating) >= threshold)
    return Rows(str(path), "label", clear)


def split(reviews: Rows, train: int, held_out: int, seed: int = 0) -> tuple[Rows, Rows]:
    """Draw two disjoint parts at random, the same ones for the same `seed`.

    Raises:
      DataError: there are fewer than `train + held_out` reviews.
    """
    if train + held_out > len(reviews):
        raise DataError(
            f"{reviews.source} has {len(reviews)} reviews, but {train} + {held_out} were requested"
        )
    order = np.random.default_rng(seed).permutation(len(reviews))
    parts = (order[:train], order[train : train + held_out])
    one, other = (tuple(reviews.rows[i] for i in part) for part in parts)
    return replace(reviews, rows=one), replace(reviews, rows=other)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")
