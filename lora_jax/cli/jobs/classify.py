"""Log-probabilities of a classifier's labels, for texts."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.classifiers import LoadedClassifier
from lora_jax.cli.errors import ClassifierError
from lora_jax.cli.fit import Fit
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training.batching import pack_texts
from lora_jax.training.classification import encode_texts, predict
from lora_jax.training.errors import DataError

SLOTS = 16  # maximum texts per row
LENGTH = 512  # tokens per row by default


def open_classifier(
    model: str, adapter: Path | None, dtype: str | None, quantize: str | None, fit: Fit
) -> tuple[LoadedClassifier, Tokenizer]:
    """Load a classifier and its tokenizer.

    Raises:
      ClassifierError: neither the model nor the adapter has a classifier's head.
      LoraError: something cannot be read or does not fit.
    """
    base = sources.find_model(model)
    sources.require_kind(base, "encoder", "decoder")
    if not classifiers.find(base, adapter):
        raise ClassifierError(
            f"{adapter or model}: is not a sequence classifier; train one with 'lora-jax train "
            "--task classification', or use 'lora-jax generate'"
        )
    tokenizer = sources.tokenizer_of(base, adapter)
    return classifiers.load(base, adapter, dtype, fit, quantize=quantize), tokenizer


def row_length(asked: int, longest: int) -> int:
    """Return the number of tokens per row: as asked for, or the default.

    Raises:
      DataError: the model has fewer positions.
    """
    if asked > longest or asked == 1:
        raise DataError(f"--length {asked}: must be from 2 to {longest} for this model")
    return asked or min(LENGTH, longest)


def log_probabilities(
    classifier: LoadedClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    rows: int,
) -> np.ndarray:
    """Return the logarithm of each label's probability for each text, float64 `[n, labels]`.

    Args:
      length: maximum tokens per row.
      rows: rows per batch.

    Raises:
      DataError: a text has no tokens, or a token that the model lacks.
    """
    places = [f"text {number}" for number in range(1, len(texts) + 1)]
    vocabulary = classifier.model.config.vocab_size
    ids, notes = encode_texts("to classify", places, texts, tokenizer, length, vocabulary)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if empty := [place for place, its in zip(places, ids, strict=True) if not len(its)]:
        raise DataError(f"{empty[0]} has no tokens; give some text to classify")
    slots = min(SLOTS, length)
    data = pack_texts(ids, length, slots)
    apply = jax.jit(lora.lora(classifier.function(slots)))
    logits = predict(apply, classifier.params, data, min(rows, len(data))).astype(np.float64)
    if not np.isfinite(logits).all():
        raise ClassifierError("the model's logits are not finite; try --dtype float32")
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
