"""Cross-entropies and their weighted sums: what every loss here is made of."""

from collections.abc import Mapping

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


def sum_weighted(losses: jax.Array, weights: jax.Array) -> LossSums:
    """Sum losses times weights, and weights, of one shape."""
    # `where`, not a product: values at padding may be infinite.
    counted = jnp.where(weights > 0, losses * weights.astype(losses.dtype), 0)
    return {"loss": counted.sum(), "weight": weights.sum()}


def sum_by_text(x: jax.Array, segments: jax.Array, counted: jax.Array, slots: int) -> jax.Array:
    """Sum values over the tokens of each text of a row.

    Args:
      x: floating `[..., length]`.
      segments: integers of that shape: 1, 2, ... for the texts of a row.
      counted: bool of that shape: the tokens whose values count.
      slots: how many texts a row may have.

    Returns:
      `[..., slots]`.
    """
    numbers = 1 + jax.lax.broadcasted_iota(segments.dtype, (*segments.shape, slots), segments.ndim)
    member = (segments[..., None] == numbers) & counted[..., None]
    return jnp.where(member, x[..., None], 0).sum(axis=-2)  # a product would be rounded on a TPU
