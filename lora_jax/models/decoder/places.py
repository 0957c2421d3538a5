"""Where the tokens of a call are, and what they see."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.attention import Sight
from lora_jax.models.cache import Cache, write
from lora_jax.models.decoder.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Positions and visibility of the tokens of one call, the same for all layers."""

    cos: jax.Array  # [batch or 1, length, head_dim / 2]
    sin: jax.Array
    sight: Sight  # where they are in the cache, and what they see of it


def check_length(config: DecoderConfig, length: int) -> None:
    if length > config.max_position_embeddings:
        raise ValueError(
            f"length {length} is above max_position_embeddings {config.max_position_embeddings}"
        )


def locate(
    c: DecoderConfig, ids: jax.Array, segments: jax.Array | None, cache: Cache | None
) -> tuple[Places, Any]:
    """Work out where tokens are and what they see; also return the segments of all slots."""
    length = ids.shape[1]
    check_length(c, length)
    if cache is not None and length > cache.length:
        raise ValueError(f"{length} tokens do not fit into a cache with {cache.length} slots")
    if segments is None and cache is None:
        places = jnp.arange(length)[None]
        return Places(*c.rope.angles(places, c.head_dim), Sight()), None
    own = jnp.ones(ids.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    if cache is None:
        sight = Sight(own, own)
    else:
        every = write(cache.segments, own, cache.filled, axis=1)
        sight = Sight(own, every, cache.filled)
    cos, sin = c.rope.angles(_positions(sight), c.head_dim)
    return Places(cos, sin, sight), sight.key_segments


def _positions(sight: Sight) -> jax.Array:
    """Return the position of each token in its text, part of which may be in the cache."""
    own, every = sight.segments, sight.key_segments
    assert own is not None and every is not None
    slot = jnp.arange(own.shape[1]) + (0 if sight.first is None else sight.first)
    before = slot[:, None] >= jnp.arange(every.shape[1])[None, :]
    # One fused sum: the square is never in memory.
    return ((own[:, :, None] == every[:, None, :]) & before[None]).sum(-1) - 1
