"""A review classifier: the BERT encoder, mean pooling, and a linear head on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from lora_jax.models.bert import Bert, BertConfig, mean_pool
from lora_jax.training.packing import Packed, batches

CLASSES = 2
# (params, ids, segments) -> (embeddings, logits), as `Classifier` takes and returns them.
Apply = Callable[[Any, Any, Any], Any]


class Classifier(nn.Module):
    """Sentence embeddings and class scores for rows of packed texts."""

    config: BertConfig
    slots: int  # texts a row holds at most

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Integers `[rows, length]` -> `[rows, slots, width]` and `[rows, slots, CLASSES]`."""
        hidden = Bert(self.config, name="encoder")(ids, segments)
        embeddings = mean_pool(hidden, segments, self.slots)
        return embeddings, nn.Dense(CLASSES, name="head")(embeddings)


def build(bert: Bert, bert_params: Any, slots: int, seed: int) -> tuple[Apply, dict[str, Any]]:
    """A classifier's function and its parameters: a pretrained encoder under a fresh head."""
    model = Classifier(bert.config, slots)

    def apply(params: Any, ids: Any, segments: Any) -> Any:
        return model.apply({"params": params}, ids, segments)

    width = bert.config.hidden_size
    kernel = nn.initializers.lecun_normal()(jax.random.key(seed), (width, CLASSES))
    return apply, {
        "encoder": bert_params,
        "head": {"kernel": kernel, "bias": jnp.zeros(CLASSES)},
    }


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean loss of `logits` `[rows, slots, CLASSES]` at `labels` `[rows, slots]`, -1 for none."""
    there = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(there, losses, 0).sum() / jnp.maximum(there.sum(), 1)


def predict(
    apply: Apply,
    params: Any,
    packed: Packed,
    size: int,
    watch: Callable[[Iterable[Packed], int], Iterable[Packed]] = lambda steps, _: steps,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs a compiled classifier over packed texts.

    Args:
      apply: the function, compiled by `jax.jit`.
      params: its parameters.
      packed: `n` texts.
      size: rows in a batch.
      watch: wraps the batches, whose number it is told: a progress bar.

    Returns:
      float32 embeddings `[n, width]` and logits `[n, CLASSES]`, in the texts' own order.
    """
    found = []
    for batch in watch(batches(packed, size), -(-len(packed) // size)):
        there = batch.source >= 0
        outputs = (np.asarray(x)[there] for x in apply(params, batch.ids, batch.segments))
        found.append((batch.source[there], *outputs))
    source, embeddings, logits = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(source)
    return embeddings[order], logits[order]
