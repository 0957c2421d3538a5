"""What `lora-jax predict` does: read texts, and print the labels of each."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.classify import log_probabilities, open_classifier, row_length
from lora_jax.core.foreign import shown
from lora_jax.training.dataset import STREAM, read_rows
from lora_jax.training.errors import DataError

_LABELS, _TEXT = 5, 60  # labels per line, and characters of the text


def run(
    model: str,
    adapter: Path | None,
    source: Sequence[str] | Path,
    *,
    length: int,
    batch: int,
    encoding: str,
    as_json: bool,
    dtype: str | None,
    quantize: str | None,
    fit: Fit,
) -> None:
    """Print a line per text; `source` is the texts or a file, the rest the command's options.

    Raises:
      DataError: the file cannot be read, or has no texts.
      LoraError: the classifier cannot be read.
    """
    texts = read_texts(source, encoding) if isinstance(source, Path) else list(source)
    classifier, tokenizer = open_classifier(model, adapter, dtype, quantize, fit)
    length = row_length(length, classifier.model.longest)
    found = np.exp(log_probabilities(classifier, tokenizer, texts, length, batch))
    for text, row in zip(texts, found, strict=True):
        ranked = [(classifier.labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")]
        print(_json(text, ranked) if as_json else _line(text, ranked))


def read_texts(path: Path, encoding: str) -> list[str]:
    """Return the texts of a file: of its rows, or the lines of a .txt file.

    Raises:
      DataError: the file cannot be read, or its rows have no text.
    """
    rows = read_rows(path, encoding)
    if rows.kind == STREAM:
        return [line for line in rows.rows[0].values["text"].splitlines() if line.strip()]
    if rows.kind not in ("text", "label"):
        raise DataError(
            f'{path} has {rows.kind} rows; to classify texts, give rows of the form {{"text": …}}'
        )
    return [row.values["text"] for row in rows.rows]


def _json(text: str, ranked: Sequence[tuple[str | int, float]]) -> str:
    label, _ = ranked[0]
    row = {"text": text, "label": label, "probabilities": {str(k): p for k, p in ranked}}
    return json.dumps(row, ensure_ascii=False)


def _line(text: str, ranked: Sequence[tuple[str | int, float]]) -> str:
    labels = "  ".join(f"{shown(label)} {p:.4f}" for label, p in ranked[:_LABELS])
    return f"{labels}{'  ...' if len(ranked) > _LABELS else ''}\t{shown(text, _TEXT)}"
