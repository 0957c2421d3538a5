"""Cross-entropy of tokens and of classes: sums over a batch, which add up across batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# "loss": of all that counts, "weight": how much counts; a classifier's also "right".
Sums = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in float32 or wider.

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
    # A comparison and a sum, not a gather, whose gradient would scatter; this one fuses.
    picked = jnp.where(classes == targets[..., None], logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def read_and_predicted(batch: Batch) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What a model reads, ids and segments without the last, and what it predicts at each place,
    ids and weights without the first; all `[rows, length]` where the batch has one token more."""
    read = (batch["ids"][:, :-1], batch["segments"][:, :-1])
    return read, (batch["ids"][:, 1:], batch["weights"][:, 1:])


def language_sums(
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> Callable[[Any, Batch], Sums]:
    """The loss of a language model, as a function of its parameters and a batch.

    Args:
      apply: `(params, ids, segments) -> logits` `[rows, length, vocabulary]`.

    Returns:
      `(params, batch) -> Sums`: "loss", the sum of weighted cross-entropies of the tokens, and
      "weight", the sum of weights. The batch is one of `data.pack_examples` or `cut_stream`.
    """

    def sums(params: Any, batch: Batch) -> Sums:
        read, (targets, weights) = read_and_predicted(batch)
        losses = cross_entropy(apply(params, *read), targets)
        return _sums(losses, weights)

    return sums


def language_sums_of_frozen_head(
    hidden: Callable[[Any, jax.Array, jax.Array], jax.Array],
    head: Callable[[Any], jax.Array],
    chunk: int = 512,
) -> Callable[[Any, Batch], Sums]:
    """`language_sums` of a model whose head does not train, `chunk` tokens at a time.

    The gradient of the hidden states is computed beside the loss, so that logits live no longer
    than their chunk and are computed once. No gradient goes to the head.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      head: `params -> [width, vocabulary]`, a plain array.
      chunk: tokens, static.
    """

    def sums(params: Any, batch: Batch) -> Sums:
        read, (targets, weights) = read_and_predicted(batch)
        states = hidden(params, *read)
        flat = (states.reshape(-1, states.shape[-1]), targets.ravel(), weights.ravel())
        pieces = tuple(_in_chunks(x, chunk) for x in flat)
        return {"loss": _total(pieces[0], head(params), *pieces[1:]), "weight": weights.sum()}

    return sums


@jax.custom_vjp
def _total(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """The summed loss of states in chunks `[chunks, chunk, width]`."""

    def one(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _of_chunk(piece[0], kernel, *piece[1:]), None

    zero = jnp.zeros((), jnp.promote_types(states.dtype, jnp.float32))
    return jax.lax.scan(one, zero, (states, targets, weights))[0]


def _of_chunk(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    return _sums(cross_entropy(states @ kernel, targets), weights)["loss"]


def _total_and_slopes(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same, and its gradient with respect to the states."""

    def one(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        loss, slope = jax.value_and_grad(_of_chunk)(piece[0], kernel, *piece[1:])
        return total + loss, slope

    zero = jnp.zeros((), jnp.promote_types(states.dtype, jnp.float32))
    return jax.lax.scan(one, zero, (states, targets, weights))


def _scaled(slopes: jax.Array, outer: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (slopes * outer).astype(slopes.dtype), None, None, None


_total.defvjp(_total_and_slopes, _scaled)


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """`[n, ...] -> [chunks, chunk, ...]`, zeros behind: targets of weight 0."""
    missing = -len(x) % chunk
    padded = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(-1, chunk, *x.shape[1:])


def class_sums(
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> Callable[[Any, Batch], Sums]:
    """The loss of a classifier of packed texts, as a function of its parameters and a batch.

    Args:
      apply: `(params, ids, segments) -> logits` `[rows, slots, classes]`.

    Returns:
      `(params, batch) -> Sums`, with "right", the number of texts whose class has the highest
      logit. The batch is one of `data.pack_labelled`.
    """

    def sums(params: Any, batch: Batch) -> Sums:
        logits = apply(params, batch["ids"], batch["segments"])
        found = _sums(cross_entropy(logits, batch["labels"]), batch["weights"])
        hits = (logits.argmax(axis=-1) == batch["labels"]) * batch["weights"]
        return {**found, "right": hits.sum()}

    return sums


def _sums(losses: jax.Array, weights: jax.Array) -> Sums:
    # Chosen, not multiplied: what stands at padding may be infinite.
    counted = jnp.where(weights > 0, losses * weights.astype(losses.dtype), 0)
    return {"loss": counted.sum(), "weight": weights.sum()}
