"""`Choosing`: how a row chooses its tokens, and `Controls`, those of all rows as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of numpy, or traced in a compiled function
#: Tokens that a request can give a bias.
MOST_BIASED = 1024


@dataclass(frozen=True)
class Choosing:
    """How a row chooses its tokens; by default it is greedy.

    Attributes:
      temperature, top_k, top_p: as in `models.Sampling`.
      seed: the key is `jax.random.key(seed)`, as that of `models.generate` would be.
      top: how many of the likeliest tokens are reported with each token.
      min_p: consider only tokens with this part of the likeliest one's probability or more.
      presence, frequency, repetition: as in `penalized`.
      bias: token ids and what is added to their logits, at most `MOST_BIASED`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether it changes the logits before a token is chosen."""
        return (self.presence, self.frequency, self.repetition, self.bias) != (0, 0, 1, ())


class Controls(NamedTuple):
    """What `Choosing` says of rows, as arrays; `top` and `changes` are of all rows together.

    Attributes:
      temperature, top_p, min_p, presence, frequency, repetition: float32 `[rows]`.
      top_k: int32 `[rows]`, the size of the vocabulary for all tokens.
      top: bool, whether a row wants the likeliest tokens.
      changes: bool, whether a row changes its logits.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence: Array
    frequency: Array
    repetition: Array
    top: Array
    changes: Array


def controls(choosing: Sequence[Choosing], vocabulary: int) -> Controls:
    """Return the arrays of rows."""
    numbers = lambda name: np.array([getattr(x, name) for x in choosing], np.float32)
    return Controls(
        numbers("temperature"),
        np.array([min(x.top_k or vocabulary, vocabulary) for x in choosing], np.int32),
        numbers("top_p"),
        numbers("min_p"),
        numbers("presence"),
        numbers("frequency"),
        numbers("repetition"),
        np.array(any(x.top for x in choosing)),
        np.array(any(x.changes_logits for x in choosing)),
    )


def bias_of(choosing: Choosing, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bias of a row as `mark_prompts` takes it, `[1, MOST_BIASED]` both."""
    tokens = np.full((1, MOST_BIASED), vocabulary, np.int32)
    values = np.zeros((1, MOST_BIASED), np.float32)
    for place, (token, value) in enumerate(choosing.bias):
        tokens[0, place], values[0, place] = token, value
    return tokens, values
