"""`Marks`: what the penalties and biases of rows are computed from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Marks(NamedTuple):
    """What is known of each token of the vocabulary, by row.

    Attributes:
      asked: bool `[rows, vocabulary]`, whether the token is in the prompt.
      made: int32 `[rows, vocabulary]`, how often the token was made.
      bias: float32 `[rows, vocabulary]`, what the request adds to its logit.
    """

    asked: jax.Array
    made: jax.Array
    bias: jax.Array


def no_marks(rows: int, vocabulary: int) -> Marks:
    """Return the marks of rows without prompts."""
    shape = (rows, vocabulary)
    return Marks(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def mark_prompts(
    ids: jax.Array, segments: jax.Array, bias: tuple[jax.Array, jax.Array], vocabulary: int
) -> Marks:
    """Return the marks of rows that begin.

    Args:
      ids: int32 `[rows, length]`, the prompts.
      segments: int32 `[rows, length]`, 0 at padding.
      bias: token ids, int32 `[rows, count]`, and float32 `[rows, count]`, what is added to their
        logits; ids of at least `vocabulary` are padding.
      vocabulary: the number of tokens that the model has.
    """
    marks, row = no_marks(len(ids), vocabulary), jnp.arange(len(ids))[:, None]
    tokens, values = bias
    return marks._replace(
        asked=marks.asked.at[row, ids].max(segments > 0),
        bias=marks.bias.at[row, tokens].add(values, mode="drop"),
    )


def mark_made(marks: Marks, tokens: jax.Array) -> Marks:
    """Return the marks after one more token of each row, int32 `[rows]`."""
    row = jnp.arange(len(tokens))
    return marks._replace(made=marks.made.at[row, tokens].add(1))


def mark_row(marks: Marks, one: Marks, row: jax.Array) -> Marks:
    """Return the marks of all rows with those of one, `[1, vocabulary]`, in a row."""
    put = lambda x, own: jax.lax.dynamic_update_slice_in_dim(x, own, row, 0)
    return jax.tree.map(put, marks, one)


def penalized(
    logits: jax.Array,
    marks: Marks,
    presence: jax.Array,
    frequency: jax.Array,
    repetition: jax.Array,
) -> jax.Array:
    """Return logits with the bias and the penalties of each row.

    The bias is added first. Logits of tokens in the prompt or made are divided by `repetition`
    where they are positive, and multiplied by it otherwise (https://arxiv.org/abs/1909.05858).
    Those of tokens that were made lose `presence` once, and `frequency` each time.

    Args:
      logits: `[rows, vocabulary]`.
      marks: of the rows.
      presence, frequency, repetition: float32 `[rows]`; 0, 0 and 1 change nothing.

    Returns:
      float32 `[rows, vocabulary]`.
    """
    changed = logits.astype(jnp.float32) + marks.bias
    factor = jnp.where(marks.asked | (marks.made > 0), repetition[:, None], 1)
    changed = jnp.where(changed > 0, changed / factor, changed * factor)
    return changed - frequency[:, None] * marks.made - presence[:, None] * (marks.made > 0)
