"""Cross-entropy of tokens and of classes, as sums over a batch: they add up across batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# "loss": the weighted sum, "weight": the sum of weights; for a classifier also "right".
LossSums = dict[str, jax.Array]
JaxBatch = Mapping[str, jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute -log softmax(logits)[target], in float32 or wider.

    Args:
      logits: floating `[..., classes]`.
      targets: integers `[...]`, in 0 .. classes - 1.

    Returns:
      `[...]`, float32 unless the logits are float64.

    >>> round(float(cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(1))), 4)
    0.2877
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    # A comparison and a sum fuse; the gradient of a gather would be a scatter.
    picked = jnp.where(classes == targets[..., None], logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def split_batch(batch: JaxBatch) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Split a batch into what the model reads and what it predicts.

    Returns:
      Ids and segments without the last token, and ids and weights without the first; each
      `[rows, length]` where the batch has `[rows, length + 1]`.
    """
    read = (batch["ids"][:, :-1], batch["segments"][:, :-1])
    return read, (batch["ids"][:, 1:], batch["weights"][:, 1:])


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
        return _sum_weighted(losses, weights)

    return sums


def language_sums_of_frozen_head(
    hidden: Callable[[Any, jax.Array, jax.Array], jax.Array],
    head: Callable[[Any], jax.Array],
    chunk: int = 512,
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return `language_sums` for a model whose head is frozen, `chunk` tokens at a time.

    The gradient of the hidden states is computed together with the loss, so logits live no longer
    than their chunk and are computed once. The head gets no gradient.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      head: `params -> [width, vocabulary]`, a plain array.
      chunk: tokens per chunk, static.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        read, (targets, weights) = split_batch(batch)
        states = hidden(params, *read)
        flat = (states.reshape(-1, states.shape[-1]), targets.ravel(), weights.ravel())
        pieces = tuple(_split_into_chunks(x, chunk) for x in flat)
        return {"loss": _total_loss(pieces[0], head(params), *pieces[1:]), "weight": weights.sum()}

    return sums


@jax.custom_vjp
def _total_loss(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum the loss of states in chunks `[chunks, chunk, width]`."""

    def one(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _chunk_loss(piece[0], kernel, *piece[1:]), None

    zero = jnp.zeros((), jnp.promote_types(states.dtype, jnp.float32))
    return jax.lax.scan(one, zero, (states, targets, weights))[0]


def _chunk_loss(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    return _sum_weighted(cross_entropy(states @ kernel, targets), weights)["loss"]


def _total_and_slopes(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the same sum, and its gradient with respect to the states."""

    def one(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        loss, slope = jax.value_and_grad(_chunk_loss)(piece[0], kernel, *piece[1:])
        return total + loss, slope

    zero = jnp.zeros((), jnp.promote_types(states.dtype, jnp.float32))
    return jax.lax.scan(one, zero, (states, targets, weights))


def _scale_slopes(slopes: jax.Array, outer: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (slopes * outer).astype(slopes.dtype), None, None, None


_total_loss.defvjp(_total_and_slopes, _scale_slopes)


def _split_into_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Reshape `[n, ...]` to `[chunks, chunk, ...]`, padded with zeros: targets of weight 0."""
    missing = -len(x) % chunk
    padded = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(-1, chunk, *x.shape[1:])


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
        found = _sum_weighted(cross_entropy(logits, batch["labels"]), batch["weights"])
        hits = (logits.argmax(axis=-1) == batch["labels"]) * batch["weights"]
        return {**found, "right": hits.sum()}

    return sums


def _sum_weighted(losses: jax.Array, weights: jax.Array) -> LossSums:
    # `where`, not a product: values at padding may be infinite.
    counted = jnp.where(weights > 0, losses * weights.astype(losses.dtype), 0)
    return {"loss": counted.sum(), "weight": weights.sum()}
