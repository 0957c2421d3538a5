"""Attention of the reference models, exact and in memory that is linear in the length.

`jax.nn.dot_product_attention` computes it: on an NVIDIA GPU by cuDNN's flash attention where that
takes the dtype and the head size, elsewhere by XLA, whose scores take `queries · keys` numbers. So
queries are cut into blocks, and each block sees only the keys up to its own end:

- One text per row and no cache: cuDNN gets its own causal mask and window, and needs no blocks.
- Packed texts, padding and caches: cuDNN takes a mask only as a dense bias, and so gets it block by
  block. A step that trains on one text per row is faster with `segments=None`.
- A cache elsewhere: products with rows and groups in front, as the cache has them. JAX's own has
  the keys in front of the groups, and mapped over rows it transposes and copies the cache.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

#: Queries per block; and the length up to which the weights of all blocks are kept for the backward
#: pass. Beyond it each block is recomputed there, so that memory is linear.
BLOCK, KEPT_WHOLE = 256, 512
#: Groups of blocks that see fewer keys than all: 4 make 5/8 of the products of a whole square.
_GROUPS, _SHORTEST_GROUP = 4, 32
_FLASH_BLOCK = 1024  # of cuDNN, whose memory beside the mask is linear anyway


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """Which keys a query sees: those of its segment, if causal up to its place.

    Attributes:
      segments: integers `[batch or 1, queries]`, or None if all tokens see one another.
      key_segments: integers `[batch or 1, keys]`, or None with `segments`.
      first: int32 scalar, the place of the first query among the keys; None for 0.
    """

    segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    first: jax.Array | None = None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight = Sight(),
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(q·kᵀ · scale)·v over the keys that each query sees, in float32 or wider.

    Args:
      query: `[batch, queries, heads, size]`.
      key, value: `[batch, keys, groups, size]` in the dtype of `query`; `groups` divides `heads`,
        and adjacent heads share a group.
      sight: the segments, and where the queries are among the keys.
      causal: whether a query sees only the keys up to its own place.
      window: how many keys a query sees on a side, its own included; None for all.
      scale: of the scores; 1 / √size by default.
      cap: scores s become cap · tanh(s / cap), as in Gemma 2, which cuDNN cannot: XLA computes it.
      sinks: `[heads]`, the score of one more key of each head, seen by all queries, whose value is
        zero, as in gpt-oss (https://arxiv.org/abs/2309.17453); XLA computes them too.

    Returns:
      The shape and dtype of `query`. A query that sees nothing gets a mean of values.
    """
    plain = cap is None and sinks is None
    flash = plain and flash_takes(query.dtype, query.shape[-1], _capability())
    if flash and causal and sight.segments is None and sight.first is None:
        reach = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            *(query, key, value),
            scale=scale,
            is_causal=True,
            local_window_size=reach,
            implementation="cudnn",
        )
    # cuDNN's backward pass needs even lengths with a bias; a few queries gain nothing from it.
    queries, keys = query.shape[1], key.shape[1]
    flash = flash and queries >= BLOCK and not (queries % 2 or keys % 2)
    by_group = sight.first is not None or not plain
    core = _Core(causal, window, flash, by_group, scale, cap)
    places = jnp.arange(queries) if sight.first is None else jnp.arange(queries) + sight.first
    return _in_groups(
        core,
        _Queries(query, sight.segments, places),
        _Keys(key, value, sight.key_segments, jnp.arange(keys), sinks),
        cut=causal and sight.first is None,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Queries:
    values: jax.Array  # [batch, queries, heads, size]
    segments: jax.Array | None  # [batch or 1, queries]
    places: jax.Array  # [queries], among the keys

    def cut(self, start: int, stop: int) -> "_Queries":
        """Return those from `start` to `stop`."""
        segments = None if self.segments is None else self.segments[:, start:stop]
        return _Queries(self.values[:, start:stop], segments, self.places[start:stop])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Keys:
    keys: jax.Array  # [batch, keys, groups, size]
    values: jax.Array
    segments: jax.Array | None  # [batch or 1, keys]
    places: jax.Array  # [keys]
    sinks: jax.Array | None  # [heads]

    def cut(self, start: int, stop: int) -> "_Keys":
        """Return those from `start` to `stop`."""
        segments = None if self.segments is None else self.segments[:, start:stop]
        part = slice(start, stop)
        places = self.places[part]
        return _Keys(self.keys[:, part], self.values[:, part], segments, places, self.sinks)


@dataclass(frozen=True)
class _Core:
    """Attention of a few queries, whose scores are in memory together."""

    causal: bool
    window: int | None
    flash: bool
    by_group: bool  # where it is not by cuDNN
    scale: float | None
    cap: float | None

    def __call__(self, queries: _Queries, keys: _Keys) -> jax.Array:
        query, key, value = queries.values, keys.keys, keys.values
        mask = self._mask(queries, keys)
        # JAX's own takes the softmax of float64 in float32.
        if query.dtype == jnp.float64 or (self.by_group and not self.flash):
            return self._attend_by_group(query, key, value, keys.sinks, mask)
        how: Literal["cudnn", "xla"] = "cudnn" if self.flash else "xla"
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=self.scale, implementation=how
        )

    def _mask(self, queries: _Queries, keys: _Keys) -> jax.Array | None:
        """Return which keys are seen, `[batch or 1, 1, queries, keys]`; None for all."""
        visible = None
        if self.causal:
            back = queries.places[:, None] - keys.places[None, :]
            visible = (back >= 0)[None]
            if self.window is not None:
                visible &= (back < self.window)[None]
        elif self.window is not None:
            away = jnp.abs(queries.places[:, None] - keys.places[None, :])
            visible = (away < self.window)[None]
        if queries.segments is not None and keys.segments is not None:
            same = queries.segments[:, :, None] == keys.segments[:, None, :]
            visible = same if visible is None else same & visible
        return None if visible is None else visible[:, None]

    def _attend_by_group(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        sinks: jax.Array | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        """Return what `jax.nn.dot_product_attention` does, the softmax in float32 or wider."""
        batch, length, _, size = query.shape
        groups, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
        products = partial(jax.lax.dot_general, preferred_element_type=dtype)
        by_group = query.reshape(batch, length, groups, -1, size).swapaxes(1, 2)
        rows = by_group.reshape(batch, groups, -1, size)  # of all queries of a group
        scores = products(rows, key.swapaxes(1, 2), (((3,), (3,)), ((0, 1), (0, 1))))
        scale = size**-0.5 if self.scale is None else self.scale
        scores = scores.reshape(*by_group.shape[:-1], -1) * jnp.asarray(scale, dtype)
        if self.cap is not None:
            scores = self.cap * jnp.tanh(scores / self.cap)
        if mask is not None:
            scores = jnp.where(mask[:, :, :, None], scores, -0.7 * jnp.finfo(dtype).max)
        weights = _softmax(scores, sinks).astype(value.dtype).reshape(*rows.shape[:-1], -1)
        mixed = products(weights, value.swapaxes(1, 2), (((3,), (2,)), ((0, 1), (0, 1))))
        mixed = mixed.astype(query.dtype).reshape(by_group.shape)
        return mixed.swapaxes(1, 2).reshape(query.shape)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Return the softmax of scores `[batch, groups, queries, heads of a group, keys]`."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    own = sinks.astype(scores.dtype).reshape(1, scores.shape[1], 1, scores.shape[3], 1)
    own = jnp.broadcast_to(own, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)[..., :-1]


def _in_groups(core: _Core, queries: _Queries, keys: _Keys, cut: bool) -> jax.Array:
    """Attend group by group of blocks; if `cut`, a group sees only the keys up to its own end."""
    length = queries.places.shape[0]
    keep = length <= KEPT_WHOLE
    block = length if keep else _FLASH_BLOCK if core.flash else BLOCK
    size = _group_size(length, block) if cut else length
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        begin = max(0, start + 1 - core.window) if cut and core.window is not None else 0
        seen = keys.cut(begin, stop) if cut else keys
        run = core if keep else jax.checkpoint(core)
        parts.append(_in_blocks(run, queries.cut(start, stop), seen, block))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _group_size(length: int, block: int) -> int:
    """Return how many queries see the same keys: whole blocks, if there are several.

    >>> [_group_size(n, n) for n in (100, 512)], _group_size(4096, 256), _group_size(1000, 256)
    ([100, 128], 1024, 256)
    """
    if block < length:
        return block * -(-length // (_GROUPS * block))
    return length if length < _GROUPS * _SHORTEST_GROUP else -(-length // _GROUPS)


def _in_blocks(
    run: Callable[[_Queries, _Keys], jax.Array], queries: _Queries, keys: _Keys, block: int
) -> jax.Array:
    """Attend from `block` queries at a time, the last ones padded."""
    length = queries.places.shape[0]
    if length <= block:
        return run(queries, keys)
    count = -(-length // block)
    split = partial(_split, count=count, block=block)
    pieces = _Queries(
        split(queries.values, axis=1),
        None if queries.segments is None else split(queries.segments, axis=1),
        split(queries.places, axis=0),
    )
    mixed = jnp.moveaxis(jax.lax.map(lambda piece: run(piece, keys), pieces), 0, 1)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])[:, :length]


def _split(x: jax.Array, count: int, block: int, axis: int) -> jax.Array:
    """Split an axis into blocks, along a new leading axis."""
    missing = count * block - x.shape[axis]
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)


def flash_takes(dtype: Any, size: int, capability: tuple[int, int] | None) -> bool:
    """Return whether cuDNN's flash attention takes a dtype and a head size.

    Args:
      dtype: of queries, keys and values.
      size: of a head.
      capability: the GPU's compute capability; None without an NVIDIA GPU.

    >>> flash_takes(jnp.bfloat16, 128, (9, 0)), flash_takes(jnp.bfloat16, 128, None)
    (True, False)
    """
    if capability is None or capability < (8, 0) or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return size % 8 == 0 and size <= (256 if capability >= (9, 0) else 128)


def _capability() -> tuple[int, int] | None:
    """Return the compute capability of the default device, if it is an NVIDIA GPU."""
    device = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None
