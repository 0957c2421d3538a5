"""`Cache`: the keys and values of the tokens that a decoder has seen."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, created by `Decoder.init_cache`.

    Attributes:
      layers: keys and values `[batch, key-value heads, length, head_dim]`: a tuple with one pair
        per layer, or a single pair with a leading axis for stacked layers.
      segments: int32 `[batch, length]`: which text each token belongs to.
      filled: int32 scalar, how many of the `length` slots are in use.
      reach: how long texts can become where the cache is exchanged for longer ones, which
        `longrope` asks; None if it is `length`.
    """

    layers: Any
    segments: jax.Array
    filled: jax.Array
    reach: int | None = field(default=None, metadata={"static": True})

    @property
    def length(self) -> int:
        """How many tokens fit into the cache."""
        return self.segments.shape[1]

    def row_axes(self) -> "Cache":
        """Return which axis of each array is the axis of rows, None where there is none.

        For `lora(apply, adapters_of=ids, row_axes={"cache": cache.row_axes()})`, and for
        `jax.vmap`.
        """
        stacked = jax.tree.leaves(self.layers)[0].ndim - 4
        return Cache(stacked, 0, None, self.reach)  # type: ignore[arg-type]


def write(old: jax.Array, new: jax.Array, first: jax.Array, axis: int) -> jax.Array:
    """Return `old` with `new` in it from `first` on along `axis`, in the dtype of `old`.

    Mapped over rows that have one `first` it is one update for all of them, in place where `old` is
    donated; JAX's own rule makes a scatter of it, and XLA then copies `old`.

    Args:
      old, new: arrays with as many axes, the first one of rows.
      first: an integer.
      axis: not the first one.
    """
    return _writer(axis)(old, new.astype(old.dtype), first)


@functools.cache
def _writer(axis: int) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    update = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis)
    mapped = custom_vmap(update)

    @mapped.def_vmap
    def many(size: int, is_mapped: Any, old: jax.Array, new: jax.Array, first: jax.Array) -> Any:
        if is_mapped[2]:
            return jax.vmap(update, [0 if x else None for x in is_mapped])(old, new, first), True
        old, new = (
            x if known else lax.broadcast(x, (size,))
            for x, known in zip((old, new), is_mapped, strict=False)
        )
        # As more rows: XLA does not update a reshaped array in place.
        rows, new = (x.reshape(-1, *x.shape[2:]) for x in (old, new))
        return _writer(axis)(rows, new, first).reshape(old.shape), True

    # A derivative takes JAX's rules, which it can transpose.
    write = jax.custom_jvp(lambda old, new, first: mapped(old, new, first))

    @write.defjvp
    def tangent(primals: Any, tangents: Any) -> Any:
        (old, new, first), (d_old, d_new, _) = primals, tangents
        return write(old, new, first), update(d_old, d_new, first)

    return write
