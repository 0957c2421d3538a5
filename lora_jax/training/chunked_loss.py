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
    sum_weighted,
)

#: Tokens per chunk and device: so many that a chunk's products keep a device busy.
CHUNK = 512
#: Logits of a head that trains are computed whole up to this many bytes in float32.
WHOLE = 2**26

Hidden = Callable[[Any, jax.Array, jax.Array], jax.Array]
Finish = Callable[[jax.Array], jax.Array]
TokenLosses = Callable[[Any, JaxBatch], jax.Array]  # (params, batch) -> [rows, length]


def language_sums_of_frozen_head(
    hidden: Hidden,
    head: Callable[[Any], jax.Array],
    chunk: int | None = None,
    finish: Finish = lambda products: products,
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return `language_sums` for a model whose head is frozen, `chunk` tokens at a time.

    The arguments are those of `token_losses_of_frozen_head`.
    """
    return _language_sums(token_losses_of_frozen_head(hidden, head, chunk, finish))


def language_sums_of_trained_head(
    hidden: Hidden, logits: Callable[[Any, jax.Array], jax.Array], chunk: int | None = None
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return `language_sums` for a model whose head trains, `chunk` tokens at a time.

    The arguments are those of `token_losses_of_trained_head`.
    """
    return _language_sums(token_losses_of_trained_head(hidden, logits, chunk))


def _language_sums(losses: TokenLosses) -> Callable[[Any, JaxBatch], LossSums]:
    return lambda params, batch: sum_weighted(losses(params, batch), batch["weights"][:, 1:])


def token_losses_of_frozen_head(
    hidden: Hidden,
    head: Callable[[Any], jax.Array],
    chunk: int | None = None,
    finish: Finish = lambda products: products,
) -> TokenLosses:
    """Return the cross-entropy of each token, for a model whose head is frozen.

    The gradient of the hidden states is computed together with the losses, so logits live no
    longer than their chunk and are computed once. The head gets no gradient.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      head: `params -> [width, vocabulary]`, a plain array.
      chunk: tokens per chunk, at least one position of all rows; by default `CHUNK` for each
        device along the axes "data" and "fsdp" of the mesh in use (`jax.set_mesh`).
      finish: makes logits of the products of states and head, such as `Decoder.finish` for models
        that cap their logits (Gemma 2); without parameters.

    Returns:
      `(params, batch) -> [rows, length]` for "ids" and "segments" `[rows, length + 1]`.
    """

    def losses(params: Any, batch: JaxBatch) -> jax.Array:
        ids = batch["ids"]
        states = hidden(params, ids[:, :-1], batch["segments"][:, :-1])
        pieces = _cut(chunk, states, ids[:, 1:])
        return _rejoin(_losses(finish, *pieces, head(params)), states.shape[1])

    return losses


def token_losses_of_trained_head(
    hidden: Hidden, logits: Callable[[Any, jax.Array], jax.Array], chunk: int | None = None
) -> TokenLosses:
    """Return the cross-entropy of each token, for a model whose head trains.

    Logits are recomputed for the gradient, which costs one more product with the head. So they are
    computed whole if they are small, up to `WHOLE` bytes on each device. The factors of an adapted
    head get their gradients chunk by chunk; dropout on its input draws the same for each chunk.

    Args:
      hidden: `(params, ids, segments) -> [rows, length, width]`.
      logits: `(params, states) -> [..., vocabulary]`.
      chunk: as for `token_losses_of_frozen_head`; if given, logits are never whole.

    Returns:
      As `token_losses_of_frozen_head`.
    """

    def losses(params: Any, batch: JaxBatch) -> jax.Array:
        ids = batch["ids"]
        states = hidden(params, ids[:, :-1], batch["segments"][:, :-1])
        one = lambda states, targets: cross_entropy(logits(params, states), targets)
        vocabulary = jax.eval_shape(logits, params, states).shape[-1]
        whole = 4 * states[..., 0].size * vocabulary // _devices_of_rows()
        if chunk is None and whole <= WHOLE:
            return one(states, ids[:, 1:])
        again = jax.checkpoint(one, prevent_cse=False)  # a scan's body is not merged anyway
        found = jax.lax.map(lambda piece: again(*piece), _cut(chunk, states, ids[:, 1:]))
        return _rejoin(found, states.shape[1])

    return losses


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


def _rejoin(x: jax.Array, length: int) -> jax.Array:
    """Return `[rows, length]` of what is `[chunks, rows, positions]`, without the padding."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]


def _devices_of_rows() -> int:
    """Return how many parts the mesh in use cuts the rows of a batch into."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(
        size for name, size, kind in axes if name in AXES_OF_ROWS and kind != AxisType.Manual
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(finish: Finish, states: jax.Array, targets: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the losses `[chunks, rows, positions]` of states in chunks `[..., width]`."""
    one = lambda piece: cross_entropy(finish(piece[0] @ kernel), piece[1])
    return jax.lax.map(one, (states, targets))


def _losses_and_slopes(
    finish: Finish, states: jax.Array, targets: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the same losses, and the gradient of each with respect to its state."""

    def one(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of = lambda states: cross_entropy(finish(states @ kernel), piece[1])
        losses, pull = jax.vjp(of, piece[0])
        return losses, *pull(jnp.ones_like(losses))

    return jax.lax.map(one, (states, targets))


def _scale_slopes(
    finish: Finish, slopes: jax.Array, outer: jax.Array
) -> tuple[jax.Array, None, None]:
    return (slopes * outer[..., None]).astype(slopes.dtype), None, None


_losses.defvjp(_losses_and_slopes, _scale_slopes)
