"""An embedding with an adapter and the options of `torch.nn.Embedding`, as pure functions.

The options act on the table that the layer means, `T = W + alpha/r · A · B`. `max_norm` bounds the
returned rows of T; `padding_idx` and `scale_grad_by_freq` change the gradient with respect to these
rows, from which those of A and B follow. So an adapted table and its merge behave alike.
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
    """Return `{"embedding": LoraWeight}`, a tree as `lora_jax.init` returns it.

    W ~ N(0, 1/√vocab_size), A ~ N(0, 0.02), and B is zero. The rows of W and A at `padding_idx` are
    zero, so that the embedding of padding is zero and stays zero while the adapter trains.

    Args:
      key: a random key.
      vocab_size: the number of rows.
      embed_dim: the number of features per row.
      rank: the rank; 0 makes a plain table, which is an array.
      alpha: numerator of the scale alpha/rank; None means alpha = rank.
      padding_idx: the id of padding; negative ids count from the end.
      dtype: the dtype of W; A and B are float32.

    Raises:
      ConfigError: a size, the rank, alpha or padding_idx has no meaning.

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
    """Return `padding_idx` counted from the start.

    Raises:
      ConfigError: the table has no such row.
    """
    if padding_idx is None:
        return None
    if not -vocab_size <= padding_idx < vocab_size:
        raise ConfigError(f"padding_idx {padding_idx} is not a row of a table of {vocab_size}")
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
    """Look up rows of the table: ids `[...]` to `[..., embed_dim]`; NaN for ids beyond the table.

    Args:
      params: parameters that `init`, `merge` or `take_rows` returned.
      ids: an array of integers.
      padding_idx: an id, counted from the start, whose row gets no gradient.
      max_norm: the largest norm of a returned row; a longer row is returned as
        row · max_norm / (norm + 1e-7). The factor is not differentiated, as in PyTorch, which also
        writes such rows back into the table; here `renorm` does that.
      norm_type: the p of the p-norm; may be infinity.
      scale_grad_by_freq: whether to divide the gradient of a row by how often its id is in `ids`.
      at: the ids of the rows in the whole table, if `params` comes from `take_rows`.

    Raises:
      ConfigError: padding_idx is negative, or max_norm or norm_type is not positive.

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
    value = constant if max_norm is None else _bound(constant, max_norm, norm_type)
    factor = jnp.ones(ids.shape, rows.dtype)
    if scale_grad_by_freq:
        factor = factor / _frequency(ids).astype(rows.dtype)
    if padding_idx is not None:
        factor = jnp.where(ids == padding_idx, jnp.zeros_like(factor), factor)
    # Exactly `value`, because what is added is zero; its derivative is `factor`.
    return value + factor[..., None] * (rows - constant)


def renorm(params: Params, ids: jax.Array, *, max_norm: float, norm_type: float = 2.0) -> Params:
    """Bound the rows of a plain table at `ids` by `max_norm`, as a lookup in PyTorch does.

    `apply` with `max_norm` bounds only the returned rows. To train as PyTorch does, bound the table
    before each step. Only the rows at `ids` are computed; donate `params` to write in place.

    Raises:
      StructureError: the table is adapted. Its base is frozen, and `apply` bounds W + scale·A·B.
      ConfigError: max_norm or norm_type is not positive.

    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.array([[0.0, 2.0], [3.0, 4.0]])}
    >>> renorm(params, jnp.array([1]), max_norm=2.5)["embedding"]
    Array([[0. , 2. ],
           [1.5, 2. ]], dtype=float32)
    """
    table = params["embedding"]
    if is_adapted(table):
        raise StructureError(
            "renorm: the base of an adapted table is frozen. Use apply(..., max_norm=...) to bound "
            "the returned rows, or merge(params) to get a plain table"
        )
    ids = ids.reshape(-1)
    rows = _bound(_lookup(params, ids), max_norm, norm_type)
    return {**params, "embedding": table.at[ids].set(rows, mode="drop")}


def _lookup(params: Params, ids: jax.Array) -> jax.Array:
    return jnp.take(params["embedding"], ids, axis=0)


def _positions(ids: jax.Array, at: jax.Array) -> jax.Array:
    """Return the positions of the ids in the sorted `at`; out of bounds for ids not in it."""
    found = jnp.searchsorted(at, ids)
    there = jnp.take(at, found, mode="clip") == ids
    return jnp.where(there, found, at.size)


def _bound(rows: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    """Return the rows, shortened to `max_norm` if they are longer."""
    if not max_norm > 0 or not norm_type > 0:
        raise ConfigError(
            f"max_norm and norm_type must be positive, got {max_norm} and {norm_type}"
        )
    norm = jnp.linalg.norm(rows, ord=norm_type, axis=-1, keepdims=True)
    return jnp.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


def _frequency(ids: jax.Array) -> jax.Array:
    """Count how often each id occurs, by sorting: no array as long as the vocabulary is made."""
    ordered = jnp.sort(ids.reshape(-1))
    first, end = (jnp.searchsorted(ordered, ids, side=side) for side in ("left", "right"))
    return end - first
