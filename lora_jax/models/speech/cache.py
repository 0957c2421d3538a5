"""`SpeechCache`: what Whisper's decoder keeps of a recording and of the tokens so far."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechCache:
    """Keys and values of a recording and of the tokens seen so far, which `Whisper.start` makes.

    Attributes:
      layers: keys and values `[batch, heads, length, size]` of the tokens: a tuple with one pair
        per layer, or a single pair with a leading axis for stacked layers.
      heard: keys and values `[batch, states, heads, size]` of the recording, in the same way.
      segments: int32 `[batch, length]`: 0 at padding.
      filled: int32 scalar, how many of the `length` slots are in use.
    """

    layers: Any
    heard: Any
    segments: jax.Array
    filled: jax.Array

    @property
    def length(self) -> int:
        """How many tokens fit into the cache."""
        return self.segments.shape[1]

    def row_axes(self) -> "SpeechCache":
        """Return which axis of each array is the axis of rows, None where there is none."""
        stacked = jax.tree.leaves(self.layers)[0].ndim - 4
        return SpeechCache(stacked, stacked, 0, None)  # type: ignore[arg-type]
