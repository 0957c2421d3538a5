"""Movie review snippets with human ratings: parsing, labelling, splitting and tokenising.

The snippets are those of Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment
analysis of social media text" (ICWSM 2014), each rated by some twenty people from -4 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SEPARATOR = "\t"


class ReviewsError(ValueError):
    """A file is not one of rated reviews, or holds too few."""


@dataclass(frozen=True)
class Reviews:
    """Texts with their labels."""

    texts: tuple[str, ...]
    labels: np.ndarray  # int32 [n]: 1 for a positive review, 0 for a negative one

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.texts),):
            raise ValueError(f"{len(self.texts)} texts, but labels of shape {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> Reviews:
        """The reviews at integer `indices` `[m]`, in their order."""
        return Reviews(tuple(self.texts[i] for i in indices), self.labels[indices])


def read(path: str | Path, threshold: float = 0.5) -> Reviews:
    """Parses a file of `number <tab> mean rating <tab> text` lines.

    Args:
      path: the file. Lines that are not UTF-8 are read as latin-1.
      threshold: snippets rated nearer to zero than this are left out as neither good nor bad.

    Returns:
      The snippets in the file's order, a text that comes twice (whatever its case) only once, so
      that no split can put it on both sides.

    Raises:
      ReviewsError: for a line that does not have these three fields; it is named by its number.
    """
    ratings: dict[str, tuple[str, float]] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            _, rating, text = _decode(line).split(SEPARATOR)
            ratings.setdefault(text.strip().lower(), (text.strip(), float(rating)))
        except ValueError as error:
            raise ReviewsError(f"{path}, line {number}: not 'number, rating, text'") from error
    clear = [(text, rating) for text, rating in ratings.values() if abs(rating) >= threshold]
    labels = np.array([rating > 0 for _, rating in clear], np.int32)
    return Reviews(tuple(text for text, _ in clear), labels)


def split(reviews: Reviews, train: int, held_out: int, seed: int = 0) -> tuple[Reviews, Reviews]:
    """Draws two disjoint parts at random, the same ones for the same `seed`.

    Raises:
      ReviewsError: when there are fewer than `train + held_out` reviews.
    """
    if train + held_out > len(reviews):
        asked = f"{train} + {held_out} reviews were asked for"
        raise ReviewsError(f"{asked}; there are {len(reviews)}")
    order = np.random.default_rng(seed).permutation(len(reviews))
    return reviews.take(order[:train]), reviews.take(order[train : train + held_out])


def tokenize(
    texts: tuple[str, ...], tokenizer_file: str | Path, max_length: int
) -> list[np.ndarray]:
    """Token ids of each text, int32 `[length]`, the two markers included, `max_length` at most."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return [np.array(text.ids, np.int32) for text in tokenizer.encode_batch(list(texts))]


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")
