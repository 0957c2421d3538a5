"""Labelled texts as token ids and class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.training.dataset import Rows
from lora_jax.training.errors import DataError, listed
from lora_jax.training.tokenize import Encoder, surrounding

Label = str | int


@dataclass(frozen=True)
class Labelled:
    """Texts with their classes."""

    texts: tuple[np.ndarray, ...]  # int32 [length] each
    labels: np.ndarray  # int32 [n]
    notes: tuple[str, ...] = ()


def classes(rows: Rows) -> tuple[Label, ...]:
    """The labels of a file, ascending: label i is class i.

    Raises:
      DataError: rows of another kind, or one label only.
    """
    _check_kind(rows)
    found = tuple(sorted({row.values["label"] for row in rows.rows}))
    if len(found) < 2:
        raise DataError(f"{rows.source}: all rows have the label {found[0]!r}; two are needed")
    return found


def encode(rows: Rows, tokenizer: Encoder, known: Sequence[Label], length: int) -> Labelled:
    """Token ids with the tokens that the model expects around a text, and class numbers.

    A text of more than `length` tokens loses its end, but not the token that closes it.

    Raises:
      DataError: rows of another kind, or labels that are not among the `known`.
    """
    _check_kind(rows)
    number = {label: i for i, label in enumerate(known)}
    problems = [
        f"line {row.line}: the label {row.values['label']!r} is not one of {list(known)}"
        for row in rows.rows
        if row.values["label"] not in number
    ]
    if problems:
        raise DataError(f"{rows.source}: labels that do not occur in training:\n{listed(problems)}")
    texts = [row.values["text"] for row in rows.rows]
    whole = [np.asarray(tokenizer.encode(text, special=True), np.int32) for text in texts]
    closing = surrounding(tokenizer)[1]
    cut = [
        ids if len(ids) <= length else np.append(ids[: length - len(closing)], closing)
        for ids in whole
    ]
    long = sum(len(ids) > length for ids in whole)
    notes = (f"{long} of {len(whole)} texts exceed {length} tokens: cut off",) if long else ()
    labels = np.array([number[row.values["label"]] for row in rows.rows], np.int32)
    return Labelled(tuple(ids.astype(np.int32) for ids in cut), labels, notes)


def _check_kind(rows: Rows) -> None:
    if rows.kind != "label":
        raise DataError(
            f'{rows.source}: {rows.kind} rows; --task classification needs {{"text", "label"}}'
        )
