"""The loss of a language model without the logits of all its tokens: some positions at a time.

A chunk is some positions of every row, so that rows which are sharded over devices stay where they
are.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lora_jax.models.on_mesh import AXES_OF_ROWS
from lora_jax.training.cross_entropy import (
    JaxBatch,
    LossSums,
    cross_entropy,
    split_batch,
    sum_weighted,
)

#: Tokens per chunk and device: so many that a chunk's products keep a device busy.
CHUNK = 512
#: Logits of a head that trains are computed whole up to this many bytes in float32.
WHOLE = 2**26

Hidden = Callable[[Any, jax.Array, jax.Array], jax.Array]
Finish = Callable[[jax.Array], jax.Array]


def language_sums_of_frozen_head(
    hidden: Hidden,
    head: Callable[[Any], jax.Array],
    chunk: int | None = None,
    finish: Finish = lambda products: products,
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return `language_sums` for a model whose head is frozen, `chunk` tokens at a time.

    The gradient of the hidden states is computed together with the loss, so logits live no longer
    than their chunk and are computed once. The head gets no gradient.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      head: `params -> [width, vocabulary]`, a plain array.
      chunk: tokens per chunk, at least one position of all rows; by default `CHUNK` for each
        device along the axes "data" and "fsdp" of the mesh in use (`jax.set_mesh`).
      finish: makes logits of the products of states and head, such as `Decoder.finish` for
        models that cap their logits (Gemma 2); without parameters.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        read, (targets, weights) = split_batch(batch)
        pieces = _cut(chunk, hidden(params, *read), targets, weights)
        loss = _total_loss(finish, pieces[0], head(params), *pieces[1:])
        return {"loss": loss, "weight": weights.sum()}

    return sums


def language_sums_of_trained_head(
    hidden: Hidden, logits: Callable[[Any, jax.Array], jax.Array], chunk: int | None = None
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return `language_sums` for a model whose head trains, `chunk` tokens at a time.

    Logits are recomputed for the gradient, which costs one more product with the head. So they are
    computed whole if they are small, up to `WHOLE` bytes on each device. The factors of an adapted
    head get their gradients chunk by chunk; dropout on its input draws the same for each chunk.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      logits: `(params, states) -> [..., vocabulary]`.
      chunk: as for `language_sums_of_frozen_head`; if given, logits are never whole.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        read, (targets, weights) = split_batch(batch)
        states = hidden(params, *read)

        def loss(states: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            losses = cross_entropy(logits(params, states), targets)
            return sum_weighted(losses, weights)["loss"]

        vocabulary = jax.eval_shape(logits, params, states).shape[-1]
        whole = 4 * targets.size * vocabulary // _devices_of_rows()
        if chunk is None and whole <= WHOLE:
            return {"loss": loss(states, targets, weights), "weight": weights.sum()}
        again = jax.checkpoint(loss, prevent_cse=False)  # a scan's body is not merged anyway
        losses = jax.lax.map(lambda piece: again(*piece), _cut(chunk, states, targets, weights))
        return {"loss": losses.sum(), "weight": weights.sum()}

    return sums


def _cut(chunk: int | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut `[rows, length, ...]` into `[chunks, rows, positions, ...]`, padded with zeros."""
    rows, length = arrays[0].shape[:2]
    tokens = CHUNK * _devices_of_rows() if chunk is None else chunk
    positions = min(length, max(1, tokens // rows))
    chunks = -(-length // positions)

    def one(x: jax.Array) -> jax.Array:
        missing = chunks * positions - length
        x = jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(rows, chunks, positions, *x.shape[2:]), 1, 0)

    return tuple(map(one, arrays))


def _devices_of_rows() -> int:
    """Return how many parts the mesh in use cuts the rows of a batch into."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(
        size for name, size, kind in axes if name in AXES_OF_ROWS and kind != AxisType.Manual
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_loss(
    finish: Finish, states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum the loss of states in chunks `[chunks, rows, positions, width]`."""

    one = lambda piece: _chunk_loss(piece[0], finish, kernel, *piece[1:])
    return jax.lax.map(one, (states, targets, weights)).sum()


def _chunk_loss(
    states: jax.Array, finish: Finish, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    return sum_weighted(cross_entropy(finish(states @ kernel), targets), weights)["loss"]


def _total_and_slopes(
    finish: Finish, states: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the same sum, and its gradient with respect to the states."""

    one = lambda piece: jax.value_and_grad(_chunk_loss)(piece[0], finish, kernel, *piece[1:])
    losses, slopes = jax.lax.map(one, (states, targets, weights))
    return losses.sum(), slopes


def _scale_slopes(
    finish: Finish, slopes: jax.Array, outer: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return (slopes * outer).astype(slopes.dtype), None, None, None


_total_loss.defvjp(_total_and_slopes, _scale_slopes)
