"""The batches of a run, also where the rows of one cannot be read."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lora_jax.training.batching import Batch
from lora_jax.training.errors import DataError
from lora_jax.training.running.ahead import place_ahead


class Feed:
    """Batches on the device.

    Once rows cannot be read, all further batches have weights that are not numbers. A step on one
    leaves the state as it was, in every process of a run, though only one of them read the rows.

    Args:
      batches: a stream of them may raise `DataError`.
      place: puts a batch on the device.
      example: returns a batch for its shapes and dtypes.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        place: Callable[[Batch], Any],
        example: Callable[[], Batch],
    ) -> None:
        self._placed = place_ahead(batches, place)
        self._place, self._example = place, example
        self._error: DataError | None = None

    def next(self) -> Any:
        """Return the next batch."""
        if self._error is None:
            try:
                return next(self._placed)
            except DataError as error:
                self._error = error
        return self._place({name: _spoilt(x) for name, x in self._example().items()})

    def check(self) -> None:
        """Raise what kept this process from reading rows, if something did."""
        if self._error is not None:
            raise self._error


def _spoilt(x: np.ndarray) -> np.ndarray:
    return np.full_like(x, np.nan) if np.issubdtype(x.dtype, np.floating) else x
