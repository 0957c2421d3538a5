"""The rows to train on and those held out, by the parts that are packed together."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax.cli.train_options import TrainOptions
from lora_jax.training.batching import Data, hold_out
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from lora_jax.training.mixing.mixture import mix
from lora_jax.training.packing import Assign, assign, assign_in_order


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows to train on, and rows to evaluate on.

    Attributes:
      trained: rows that are packed together, for each weight.
      weights: how often the rows of each are visited per epoch.
      held_out: rows to evaluate on, if there are any.
      by: how training rows share a row of tokens; held-out rows never depend on their order.
    """

    trained: list[Rows]
    weights: list[float]
    held_out: Rows | None
    by: Assign

    @property
    def every(self) -> list[Rows]:
        """All parts, the held-out rows last."""
        return [*self.trained, *([self.held_out] if self.held_out else [])]

    @property
    def packings(self) -> list[Assign]:
        """How to pack each of all parts."""
        return [*(self.by for _ in self.trained), *([assign] if self.held_out else [])]

    def join(self, packed: Sequence[Data]) -> tuple[Data, Data | None]:
        """Return the data to train on and to evaluate on, of all parts as they were packed."""
        count = len(self.trained)
        return mix(packed[:count], self.weights), packed[count] if self.held_out else None


def split(
    options: TrainOptions,
    files: Sequence[Rows],
    weights: Sequence[float],
    others: Sequence[Rows],
) -> Parts:
    """Return the rows to train on and those held out, of files of one kind.

    Files are packed together, unless one of them has a weight.
    """
    by = assign if options.shuffle else assign_in_order
    if all(weight == 1 for weight in weights):
        files, weights = [join(files)], [1.0]
    if not options.eval_split:
        return Parts([*files], [*weights], join(others) if others else None, by)
    every = join(files)
    try:
        trained, _ = hold_out(len(every), options.eval_split, options.seed)
    except ValueError as error:
        raise DataError(f"--eval-split: {error}; choose another fraction") from None
    is_trained = iter(np.isin(np.arange(len(every)), trained).tolist())
    kept = [[(row, next(is_trained)) for row in file.rows] for file in files]
    parts = [
        dataclasses.replace(file, rows=tuple(row for row, trains in rows if trains))
        for file, rows in zip(files, kept, strict=True)
    ]
    for part in parts:
        if not part.rows:
            raise DataError(f"--eval-split leaves no row of {part.source} to train on")
    held_out = tuple(row for rows in kept for row, trains in rows if not trains)
    return Parts(parts, [*weights], dataclasses.replace(every, rows=held_out), by)


def join(files: Sequence[Rows]) -> Rows:
    """Return the rows of files of one kind as those of one."""
    rows: tuple[Row, ...] = tuple(row for file in files for row in file.rows)
    return Rows(", ".join(file.source for file in files), files[0].kind, rows)
