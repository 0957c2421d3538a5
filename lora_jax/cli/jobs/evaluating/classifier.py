"""Accuracy and loss of a classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.classify import log_probabilities, open_classifier, row_length
from lora_jax.cli.jobs.evaluating.subject import Settings
from lora_jax.core.foreign import shown
from lora_jax.training.dataset import Rows
from lora_jax.training.errors import DataError, list_problems


def classifier_figures(
    files: Sequence[Rows],
    model: str,
    adapter: Path | None,
    settings: Settings,
    dtype: str | None,
    fit: Fit,
) -> dict[str, Any]:
    """Return the number of texts, accuracy and loss, and how many texts of each label are right.

    Raises:
      DataError: rows are of another kind, or have labels that the classifier does not have.
      LoraError: the model or the adapter cannot be read.
    """
    for rows in files:
        if rows.kind != "label":
            raise DataError(
                f"{rows.source} has {rows.kind} rows, but the accuracy of a classifier needs rows "
                'of the form {"text": …, "label": …}'
            )
    classifier, tokenizer = open_classifier(model, adapter, dtype, settings.quantize, fit)
    length = row_length(settings.length, classifier.model.longest)
    wanted = np.array([n for rows in files for n in _numbers(rows, classifier.labels)])
    texts = [row.values["text"] for rows in files for row in rows.rows]
    found = log_probabilities(classifier, tokenizer, texts, length, settings.batch)
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
