"""An embedding made with its adapter, with the options of torch.nn.Embedding; pure functions.

The options act on the table that the layer means, `T = W + alpha/r · A · B`: `max_norm` bounds the
rows of T that come out, `padding_idx` and `scale_grad_by_freq` change the gradient with respect to
those rows, from which A's and B's follow. So an adapted table and its merge behave alike.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.core.weights import LoraWeight, is_adapted
from lora_jax.engine.transform import lora
from lora_jax.layers import initial

Params = dict[str, Any]


def init(
    key: jax.Array,
    vocab_size: int,
    embed_dim: int,
    rank: int,
    alpha: float | None = 1.0,
    *,
    padding_idx: int | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """`{"embedding": LoraWeight}`, a tree as `lora_jax.init` returns it.

    W ~ N(0, 1/√vocab_size), A ~ N(0, 0.02), B zero. The rows of W and A at `padding_idx` are zero,
    so that padding embeds as zero and stays so while the adapter trains.

    Args:
      key: a random key.
      vocab_size: number of rows; embed_dim: features of a row.
      rank: the rank; 0 makes a plain table, an array.
      alpha: numerator of the scale alpha/rank; None means alpha = rank.
      padding_idx: the id of padding; a negative one counts from the end.
      dtype: of W; A and B are in float32.

    Raises:
      ConfigError: a size, the rank, alpha or padding_idx cannot be used.

    >>> import jax
    >>> table = init(jax.random.key(0), 1000, 64, rank=4, padding_idx=0)["embedding"]
    >>> table.a.shape, table.b.shape, float(abs(table.w[0]).max())
    ((1000, 4), (4, 64), 0.0)
    """
    table = initial.weight(key, (vocab_size, embed_dim), rank, alpha, use="gather", dtype=dtype)
    row = padding_row(padding_idx, vocab_size)
    if row is None:
        return {"embedding": table}
    if not isinstance(table, LoraWeight):
        return {"embedding": table.at[row].set(0)}
    w, a = (x.at[row].set(0) for x in (table.w, table.a))
    return {"embedding": dataclasses.replace(table, w=w, a=a)}


def padding_row(padding_idx: int | None, vocab_size: int) -> int | None:
    """`padding_idx` counted from the start.

    Raises:
      ConfigError: there is no such row.
    """
    if padding_idx is None:
        return None
    if not -vocab_size <= padding_idx < vocab_size:
        raise ConfigError(f"padding_idx {padding_idx} is no row of a table of {vocab_size}")
    return padding_idx % vocab_size


def apply(
    params: Params,
    ids: jax.Array,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    at: jax.Array | None = None,
) -> jax.Array:
    """The rows of the table at `ids`: `[...]` to `[..., embed_dim]`; NaN at an id it has not.

    Args:
      params: as `init`, `merge` or `take_rows` return them.
      ids: integers.
      padding_idx: an id, counted from the start, whose rows get no gradient.
      max_norm: the bound of a row's norm: a longer one comes out as
        row · max_norm / (norm + 1e-7). The bound is not differentiated, as in torch, which writes
        such rows back into the table before it reads them; `renorm` does that here.
      norm_type: the p of the norm; infinity is one.
      scale_grad_by_freq: divide the gradient of a row by how often its id is in `ids`.
      at: with `params` from `take_rows`, the ids that these rows have in the whole table.

    Raises:
      ConfigError: padding_idx is negative, or max_norm or norm_type is not above zero.

    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.array([[0.0, 0.0], [3.0, 4.0]])}
    >>> apply(params, jnp.array([1, 0]), max_norm=2.5)
    Array([[1.5, 2. ],
           [0. , 0. ]], dtype=float32)
    """
    if padding_idx is not None and padding_idx < 0:
        raise ConfigError(f"padding_idx must be counted from the start here, got {padding_idx}")
    rows = lora(_lookup, on_dense="error")(params, ids if at is None else _positions(ids, at))
    if padding_idx is None and max_norm is None and not scale_grad_by_freq:
        return rows
    constant = lax.stop_gradient(rows)
    value = constant if max_norm is None else _bounded(constant, max_norm, norm_type)
    factor = jnp.ones(ids.shape, rows.dtype)
    if scale_grad_by_freq:
        factor = factor / _frequency(ids).astype(rows.dtype)
    if padding_idx is not None:
        factor = jnp.where(ids == padding_idx, jnp.zeros_like(factor), factor)
    # Exactly `value`, for what is added is zero; its derivative is `factor`.
    return value + factor[..., None] * (rows - constant)


def renorm(params: Params, ids: jax.Array, *, max_norm: float, norm_type: float = 2.0) -> Params:
    """A plain table with its rows at `ids` bounded by `max_norm`, as a lookup of torch leaves it.

    `apply` with `max_norm` only bounds what comes out. To train as torch does, bound the table
    before each step. Nothing but the rows at `ids` is computed; donate `params` to write in place.

    Raises:
      StructureError: the table is adapted: its base is frozen, and `apply` bounds W + scale·A·B.
      ConfigError: max_norm or norm_type is not above zero.

    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.array([[0.0, 2.0], [3.0, 4.0]])}
    >>> renorm(params, jnp.array([1]), max_norm=2.5)["embedding"]
    Array([[0. , 2. ],
           [1.5, 2. ]], dtype=float32)
    """
    table = params["embedding"]
    if is_adapted(table):
        raise StructureError(
            "renorm: the base of an adapted table is frozen; apply(..., max_norm=...) bounds the "
            "rows that come out, and merge makes a plain table"
        )
    ids = ids.reshape(-1)
    rows = _bounded(_lookup(params, ids), max_norm, norm_type)
    return {**params, "embedding": table.at[ids].set(rows, mode="drop")}


def _lookup(params: Params, ids: jax.Array) -> jax.Array:
    return jnp.take(params["embedding"], ids, axis=0)


def _positions(ids: jax.Array, at: jax.Array) -> jax.Array:
    """Where the ids are in the sorted `at`; out of bounds where they are not."""
    found = jnp.searchsorted(at, ids)
    there = jnp.take(at, found, mode="clip") == ids
    return jnp.where(there, found, at.size)


def _bounded(rows: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    """The rows, those longer than `max_norm` shortened to it."""
    if not max_norm > 0 or not norm_type > 0:
        raise ConfigError(
            f"max_norm and norm_type must be above zero, got {max_norm} and {norm_type}"
        )
    norm = jnp.linalg.norm(rows, ord=norm_type, axis=-1, keepdims=True)
    return jnp.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


def _frequency(ids: jax.Array) -> jax.Array:
    """How often each id is among them all; by sorting, which needs no array of the vocabulary."""
    ordered = jnp.sort(ids.reshape(-1))
    first, end = (jnp.searchsorted(ordered, ids, side=side) for side in ("left", "right"))
    return end - first
