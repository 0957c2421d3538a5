"""Token ids that a model has no embedding for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.foreign import shown
from lora_jax.training.errors import DataError


def refuse_unknown(
    source: str,
    places: Sequence[str],
    rows: Sequence[np.ndarray],
    tokenizer: Any,
    vocabulary: int | None,
) -> None:
    """Raise `DataError` if a token has no place in the model's vocabulary.

    JAX gives NaN for the embedding of such a token, and a finite wrong loss where it is predicted.

    Args:
      source: the name of the data file.
      places: what to call each row: "line 7".
      rows: the token ids of each row.
      tokenizer: names the token, if it can `decode`.
      vocabulary: number of the model's tokens; None for any.
    """
    if vocabulary is None:
        return
    beyond = [int(np.sum(ids >= vocabulary)) for ids in rows]
    if not any(beyond):
        return
    first = next(i for i, count in enumerate(beyond) if count)
    token = int(rows[first][rows[first] >= vocabulary][0])
    decode = getattr(tokenizer, "decode", None)
    name = f"{shown(repr(decode([token], special=True)))} ({token})" if decode else f"{token}"
    count = sum(map(bool, beyond))
    others = f" and {count - 1} more of {len(rows)} rows" if count > 1 else ""
    raise DataError(
        f"{source}, {places[first]}{others}: the token {name} is beyond the model's vocabulary, "
        f"which ends at {vocabulary - 1}; use the tokenizer that belongs to the model, remove the "
        "token from the data, or grow the vocabulary first (models.resize_vocabulary)"
    )
