"""What `lora-jax eval` does: the loss of a language model or a classifier on files."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import ClassifierError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.classify import log_probabilities, open_classifier, row_length
from lora_jax.cli.jobs.training.data import is_packed, language_loss
from lora_jax.cli.jobs.training.model import to_trainable
from lora_jax.core.foreign import shown
from lora_jax.core.tree import adapted_nodes
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training.batching import Data, cut_stream, pack_examples
from lora_jax.training.dataset import STREAM, Rows, read_rows
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.loop import measure
from lora_jax.training.streaming.files import find_files
from lora_jax.training.tokenize import encode_examples, encode_stream


def run(
    model: str,
    adapter: Path | None,
    files: Sequence[Path],
    *,
    length: int,
    batch: int,
    encoding: str,
    as_json: bool,
    dtype: str | None,
    quantize: str | None,
    fit: Fit,
) -> None:
    """Print what was measured; the arguments are the command's options.

    Raises:
      DataError: a file cannot be read or has rows of another kind.
      LoraError: the model cannot be read.
    """
    rows = [read_rows(path, encoding) for path in find_files(files)]
    base = sources.find_model(model)
    sources.require_kind(base, "encoder", "decoder")
    if classifiers.find(base, adapter):
        found = _classifier(rows, model, adapter, length, batch, dtype, quantize, fit)
    else:
        loaded = sources.load(base, adapter, dtype, fit, quantize=quantize)
        found = _language_model(rows, loaded, sources.tokenizer_of(base, adapter), length, batch)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for name, value in found.items():
        for line in _lines(name, value):
            print(line)


def _lines(name: str, value: Any) -> list[str]:
    """Return the lines of one measurement."""
    if isinstance(value, dict):
        return [f"{name} {shown(key):<16} {one}" for key, one in value.items()]
    number = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return [f"{name:<12} {f'{value:.2%}' if name == 'accuracy' else number}"]


def _language_model(
    files: Sequence[Rows], loaded: sources.Loaded, tokenizer: Tokenizer, length: int, batch: int
) -> dict[str, Any]:
    model = to_trainable(loaded.model, tokenizer)
    if model.apply is None:
        raise ClassifierError(
            f"{loaded.model.family.stem} without a classifier's head has no loss; give a "
            "classifier's --adapter"
        )
    length = row_length(length, model.longest)
    parts = [_batches_of(rows, tokenizer, length, model.vocabulary) for rows in files]
    data = Data({k: np.concatenate([part.arrays[k] for part in parts]) for k in parts[0].arrays})
    params = loaded.params
    sums = language_loss(model, adapted_nodes(params), packed=is_packed(data))
    loss = jax.jit(lora.lora(sums))
    found = measure(
        lambda adapters, base, rows: loss(base, rows), None, params, data, min(batch, len(data))
    )
    return {
        "rows": len(data),
        "tokens": int(data.arrays["weights"].sum()),
        "loss": found["eval_loss"],
        "perplexity": found["perplexity"],
    }


def _batches_of(rows: Rows, tokenizer: Tokenizer, length: int, vocabulary: int) -> Data:
    """Encode a file as training does."""
    if rows.kind == STREAM:
        return cut_stream(encode_stream(rows, tokenizer, vocabulary=vocabulary), length)
    encoded = encode_examples(rows, tokenizer, length + 1, vocabulary=vocabulary)
    for note in encoded.notes:
        print(f"note: {note}", file=sys.stderr)
    return pack_examples(encoded.examples, length)


def _classifier(
    files: Sequence[Rows],
    model: str,
    adapter: Path | None,
    length: int,
    batch: int,
    dtype: str | None,
    quantize: str | None,
    fit: Fit,
) -> dict[str, Any]:
    for rows in files:
        if rows.kind != "label":
            raise DataError(
                f"{rows.source} has {rows.kind} rows, but the accuracy of a classifier needs rows "
                'of the form {"text": …, "label": …}'
            )
    classifier, tokenizer = open_classifier(model, adapter, dtype, quantize, fit)
    length = row_length(length, classifier.model.longest)
    wanted = np.array([n for rows in files for n in _numbers(rows, classifier.labels)])
    texts = [row.values["text"] for rows in files for row in rows.rows]
    found = log_probabilities(classifier, tokenizer, texts, length, batch)
    right = found.argmax(-1) == wanted
    return {
        "texts": len(texts),
        "accuracy": float(right.mean()),
        "loss": float(-found[np.arange(len(wanted)), wanted].mean()),
        "right of": {
            str(label): f"{right[wanted == i].sum()}/{(wanted == i).sum()}"
            for i, label in enumerate(classifier.labels)
            if (wanted == i).any()
        },
    }


def _numbers(rows: Rows, labels: Sequence[Any]) -> list[int]:
    """Return the class of each row: by its label, or by its number if all rows have integers.

    Raises:
      DataError: labels that the classifier does not have.
    """
    number = {str(label): i for i, label in enumerate(labels)}
    given = [row.values["label"] for row in rows.rows]
    if all(isinstance(x, int) for x in given) and not all(str(x) in number for x in given):
        number = {str(i): i for i in range(len(labels))}
    problems = [
        f"line {row.line}: the label {shown(repr(label))}"
        for row, label in zip(rows.rows, given, strict=True)
        if str(label) not in number
    ]
    if problems:
        known = shown(", ".join(map(str, labels)))
        raise DataError(
            f"{rows.source}: labels that the classifier does not have (it has {known}):\n"
            f"{list_problems(problems)}"
        )
    return [number[str(label)] for label in given]
