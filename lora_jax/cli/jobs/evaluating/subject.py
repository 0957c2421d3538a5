"""What is measured: a model with one of several adapters, and how to read data for it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax.cli import sources
from lora_jax.cli.errors import ClassifierError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.classify import row_length
from lora_jax.cli.jobs.training.model import TrainableModel, to_trainable
from lora_jax.files import kinds
from lora_jax.models import Pretrained
from lora_jax.models.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """The options of the command that a measurement needs.

    Attributes:
      length: maximum tokens per row; 0 for the default.
      batch: rows per batch.
      exact: whether answers are generated and compared.
      max_tokens: maximum tokens of an answer; 0: by the longest one in the data.
      quantize: as in `sources.load`.
    """

    length: int
    batch: int
    exact: bool
    max_tokens: int
    quantize: str | None


@dataclass(frozen=True)
class Subject:
    """A language model, perhaps with an adapter.

    Attributes:
      base: where the model is.
      loaded: the model and the adapter.
      tokenizer: the adapter's, or the model's.
      adapter: its path, or None.
    """

    base: kinds.Found
    loaded: sources.Loaded
    tokenizer: Tokenizer
    adapter: Path | None

    def trainable(self) -> TrainableModel:
        """Return the model as training sees it.

        Raises:
          ClassifierError: it predicts no tokens.
        """
        model = to_trainable(self.loaded.model, self.tokenizer)
        if model.apply is None:
            raise ClassifierError(
                f"{self.loaded.model.family.stem} without a classifier's head has no loss; give a "
                "classifier's --adapter"
            )
        return model

    def length(self, settings: Settings) -> int:
        """Return the tokens per row."""
        return row_length(settings.length, self.loaded.model.longest)


def subjects(
    base: kinds.Found,
    adapters: Sequence[Path | None],
    dtype: str | None,
    fit: Fit,
    quantize: str | None,
) -> Iterator[Subject]:
    """Yield the model with each adapter; it is read once for all that stack layers alike.

    Raises:
      LoraError: something cannot be read, or an adapter does not fit.
    """
    before: tuple[bool, Pretrained] | None = None
    for path in adapters:
        found = None if path is None else kinds.adapter(path)
        scan = found is not None and sources.is_stacked(found)
        if before is None or before[0] != scan:
            before = scan, sources.load_model(base, dtype, scan=scan, quantize=quantize)
        model = before[1]
        loaded = sources.Loaded(model, None) if found is None else sources.put_on(model, found, fit)
        yield Subject(base, loaded, sources.tokenizer_of(base, path), path)


class Notes:
    """Notes about data on stderr, each of them once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, notes: Sequence[str]) -> None:
        """Print notes that are new."""
        for note in notes:
            if note not in self._said:
                print(f"note: {note}", file=sys.stderr)
        self._said |= {*notes}
