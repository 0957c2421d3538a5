"""Classification of texts: labelled rows, a pooled head on a pretrained model, predictions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.classifier import Classifier, Pooling
from lora_jax.training.batching import Batch, Data, batches, steps_per_epoch
from lora_jax.training.dataset import Rows
from lora_jax.training.encoders import Encoder, surrounding
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.vocabulary import refuse_unknown

Label = str | int


@dataclass(frozen=True)
class LabelledTexts:
    """Token ids of texts, with their classes."""

    texts: tuple[np.ndarray, ...]  # int32 [length] each
    labels: np.ndarray  # int32 [n]
    notes: tuple[str, ...] = ()


def classes(rows: Rows) -> tuple[Label, ...]:
    """Return the labels of a file, ascending: label i is class i.

    Raises:
      DataError: the rows are not labelled, or all have the same label.
    """
    _check_kind(rows)
    found = tuple(sorted({row.values["label"] for row in rows.rows}))
    if len(found) < 2:
        raise DataError(
            f"{rows.source}: all rows have the label {found[0]!r}; a classifier needs two labels"
        )
    return found


def encode_labelled(
    rows: Rows,
    tokenizer: Encoder,
    known: Sequence[Label],
    length: int,
    *,
    vocabulary: int | None = None,
) -> LabelledTexts:
    """Encode texts, with the tokens that the model expects around each, and number their labels.

    A text of more than `length` tokens is truncated, but keeps the token that closes it.

    Args:
      rows: rows of kind "label".
      tokenizer: turns text into ids.
      known: the labels as `classes` returns them: label i is class i.
      length: maximum number of tokens per text.
      vocabulary: number of the model's tokens, to refuse ids beyond it.

    Raises:
      DataError: the rows are not labelled, a label is not among the `known`, or a token is not in
        the vocabulary.
    """
    _check_kind(rows)
    number = {label: i for i, label in enumerate(known)}
    problems = [
        f"{rows.unit} {row.line}: the label {row.values['label']!r} is not one of {list(known)}"
        for row in rows.rows
        if row.values["label"] not in number
    ]
    if problems:
        raise DataError(
            f"{rows.source}: labels that the training data does not contain:\n"
            f"{list_problems(problems)}"
        )
    texts = [row.values["text"] for row in rows.rows]
    encoded, notes = encode_texts(rows.source, rows.places, texts, tokenizer, length, vocabulary)
    labels = np.array([number[row.values["label"]] for row in rows.rows], np.int32)
    return LabelledTexts(encoded, labels, notes)


def encode_texts(
    source: str,
    places: Sequence[str],
    texts: Sequence[str],
    tokenizer: Encoder,
    length: int,
    vocabulary: int | None = None,
) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
    """Return the token ids of texts, truncated as in `encode_labelled`, and notes about that.

    Args:
      source: the name of the texts' file, for errors.
      places: what to call each text: "line 7".
      texts: the texts.
      tokenizer, length, vocabulary: as in `encode_labelled`.

    Raises:
      DataError: a token is not in the vocabulary.
    """
    whole = [np.asarray(tokenizer.encode(text, special=True), np.int32) for text in texts]
    refuse_unknown(source, places, whole, tokenizer, vocabulary)
    closing = surrounding(tokenizer)[1]
    cut = [
        ids if len(ids) <= length else np.append(ids[: length - len(closing)], closing)
        for ids in whole
    ]
    long = sum(len(ids) > length for ids in whole)
    notes = (f"{long} of {len(whole)} texts exceed {length} tokens: truncated",) if long else ()
    return tuple(ids.astype(np.int32) for ids in cut), notes


def _check_kind(rows: Rows) -> None:
    if rows.kind != "label":
        raise DataError(
            f"{rows.source} has {rows.kind} rows, but a classifier needs rows of the form "
            '{"text": …, "label": …}'
        )


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def new_layer(
    seed: int,
    width: int,
    out: int,
    initializer: Callable[[jax.Array, tuple[int, ...]], jax.Array] = _normal,
) -> dict[str, jax.Array]:
    """Return float32 parameters of a linear layer, as `with_head` makes them for the head."""
    return {"kernel": initializer(jax.random.key(seed), (width, out)), "bias": jnp.zeros(out)}


def with_head(
    hidden: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    width: int,
    classes: int,
    slots: int,
    seed: int,
    initializer: Callable[[jax.Array, tuple[int, ...]], jax.Array] = _normal,
    *,
    pooling: Pooling = "mean",
    pooler: Any = None,
    bias: bool = True,
) -> tuple[Classifier, dict[str, Any]]:
    """Put a new head on a pretrained model.

    Args:
      hidden: `(params, ids, segments) -> hidden states` `[rows, length, width]`.
      params: parameters of `hidden`.
      width: size of a hidden state.
      classes: number of logits per text.
      slots: maximum number of texts per row.
      seed: random seed for the head.
      initializer: for the head's kernel `[width, classes]`, like those in
        `jax.nn.initializers`; N(0, 1/width) by default. The bias is zero.
      pooling: what represents a text, as in `Classifier`.
      pooler: parameters of BERT's layer before the head, if there is one.
      bias: whether the head has a bias.

    Returns:
      The classifier, and its parameters: the model's as "encoder", a float32 "head", and the
      "pooler".
    """
    head = new_layer(seed, width, classes, initializer)
    if not bias:
        del head["bias"]
    found = {"encoder": params, "head": head}
    return Classifier(hidden, slots, pooling), found | (
        {} if pooler is None else {"pooler": pooler}
    )


def predict(
    apply: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    texts: Data,
    rows: int,
    watch: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, total: batches,
) -> np.ndarray:
    """Return a function's output for every text, in the texts' original order.

    Args:
      apply: `(params, ids, segments) -> [rows, slots, ...]`, compiled by `jax.jit`.
      params: its parameters.
      texts: `n` texts, from `pack_texts`.
      rows: rows per batch.
      watch: wraps the batches, given how many there are; `progress.track` makes such a wrapper.

    Returns:
      `[n, ...]`.
    """
    found = []
    for batch in watch(batches(texts, rows), steps_per_epoch(len(texts), rows)):
        there = batch["weights"] > 0
        outputs = np.asarray(apply(params, batch["ids"], batch["segments"]))
        found.append((batch["source"][there], outputs[there]))
    source, outputs = (np.concatenate(part) for part in zip(*found, strict=True))
    return outputs[np.argsort(source)]
