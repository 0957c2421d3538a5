"""Move what a shared cache of keys and values contains, and put the cache of a prompt into it.

A cache has a row per text and a column per token, and all rows write their next token into the same
column, the first free one. So a prompt is put right before that column, whenever it arrives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.cache import Cache

_ROWS, _COLUMNS = -4, -2  # axes of keys and values


def sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """Return the lengths to which things are padded: each twice the one before, then the largest.

    >>> sizes(32, 200), sizes(32, 20)
    ((32, 64, 128, 200), (20,))
    """
    found = []
    while smallest < largest:
        found.append(smallest)
        smallest *= 2
    return (*found, largest)


def at_least(lengths: tuple[int, ...], wanted: int) -> int:
    """Return the first length that is not too short, or the last one.

    >>> at_least((32, 64), 33), at_least((32, 64), 100)
    (64, 64)
    """
    return next((length for length in lengths if length >= wanted), lengths[-1])


def move(cache: Cache, offset: jax.Array, length: int) -> Cache:
    """Return a cache of another length whose column 0 is the old column `offset`.

    Args:
      cache: the old one.
      offset: integer, negative to make room before what is there.
      length: the number of columns of the new one; what has no place there is dropped.
    """
    columns = jnp.arange(length) + offset
    known = (columns >= 0) & (columns < cache.filled)
    take = lambda x, axis: jnp.take(x, columns, axis=axis, mode="clip")
    return Cache(
        jax.tree.map(lambda x: take(x, x.ndim + _COLUMNS), cache.layers),
        jnp.where(known[None], take(cache.segments, 1), 0),
        cache.filled - offset,
        cache.reach,
    )


def widen(cache: Cache, length: int) -> Cache:
    """Return a cache with free columns behind those that it has, up to a length."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, length - cache.length if n == axis else 0) for n in range(x.ndim)]
        return jnp.pad(x, widths)

    layers = jax.tree.map(lambda x: pad(x, x.ndim + _COLUMNS), cache.layers)
    return Cache(layers, pad(cache.segments, 1), cache.filled, cache.reach)


def insert(cache: Cache, prompt: Cache, row: jax.Array) -> Cache:
    """Return the cache with a prompt in one of its rows, right before the first free column.

    Args:
      cache: of all rows; its `filled` is at least the number of the prompt's tokens.
      prompt: the cache of one row, whose tokens are right before its own first free column.
      row: integer.
    """
    wide = widen(prompt, cache.length)

    def put(x: jax.Array, own: jax.Array, columns: int, rows: int) -> jax.Array:
        # Columns that leave on one side come back on the other: padding, of segment 0.
        own = jnp.roll(own, cache.filled - prompt.filled, columns)
        return jax.lax.dynamic_update_slice_in_dim(x, own.astype(x.dtype), row, rows)

    keys: Callable[[Any, Any], Any] = lambda x, own: put(x, own, x.ndim + _COLUMNS, x.ndim + _ROWS)
    return Cache(
        jax.tree.map(keys, cache.layers, wide.layers),
        put(cache.segments, wide.segments, 1, 0),
        cache.filled,
        cache.reach,
    )
