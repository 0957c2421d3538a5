"""Losses of language models and classifiers, as sums over a batch: they add up across batches."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.training.cross_entropy import (
    JaxBatch,
    LossSums,
    cross_entropy,
    split_batch,
    sum_weighted,
)


def language_sums(
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return the loss of a language model, as a function of its parameters and a batch.

    Args:
      apply: `(params, ids, segments) -> logits` `[rows, length, vocabulary]`.

    Returns:
      `(params, batch) -> LossSums`: "loss", the sum of weighted cross-entropies of the tokens, and
      "weight", the sum of weights. Batches come from `pack_examples` or `cut_stream`.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        read, (targets, weights) = split_batch(batch)
        losses = cross_entropy(apply(params, *read), targets)
        return sum_weighted(losses, weights)

    return sums


def class_sums(
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return the loss of a classifier of packed texts, as a function of its parameters and a batch.

    Args:
      apply: `(params, ids, segments) -> logits` `[rows, slots, classes]`.

    Returns:
      `(params, batch) -> LossSums`, with "right", the number of texts whose class has the highest
      logit. Batches come from `pack_labelled` or `add_labels`.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        logits = apply(params, batch["ids"], batch["segments"])
        found = sum_weighted(cross_entropy(logits, batch["labels"]), batch["weights"])
        hits = (logits.argmax(axis=-1) == batch["labels"]) * batch["weights"]
        return {**found, "right": hits.sum()}

    return sums
