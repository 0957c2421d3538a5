"""Where the tokens of a call are, and what they see."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.attention import Sight
from lora_jax.models.cache import Cache, write
from lora_jax.models.decoder.config import DecoderConfig, LayerKind
from lora_jax.models.rope import Rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Positions and visibility of the tokens of one call, the same for all layers.

    Attributes:
      angles: cosine and sine `[batch or 1, length, pairs]` for each rotation that some layer has.
      sight: where the tokens are in the cache, and what they see of it.
      kinds: the kinds of layers.
    """

    angles: tuple[tuple[jax.Array, jax.Array], ...]
    sight: Sight
    kinds: tuple[LayerKind, ...] = field(metadata={"static": True})

    def angles_of(self, kind: LayerKind | None) -> tuple[jax.Array, jax.Array] | None:
        """Return cosine and sine for a layer, None if it does not rotate."""
        if kind is None or kind.rope is None:
            return None
        return self.angles[_ropes(self.kinds).index(kind.rope)]

    def chosen_angles(self, which: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosine and sine for a layer of a kind that is not known before it runs."""
        if len(self.angles) == 1 and all(kind.rope for kind in self.kinds):
            return self.angles[0]
        cos, sin = self.angles[0]
        none = (jnp.ones_like(cos), jnp.zeros_like(sin))  # of angle zero: exactly no rotation
        found = [none if kind.rope is None else self.angles_of(kind) for kind in self.kinds]
        return jax.tree.map(lambda *each: jnp.stack(each)[which], *found)


def kinds_of(config: DecoderConfig) -> tuple[LayerKind, ...]:
    """Return the kinds that a model's layers have, each once."""
    return tuple(dict.fromkeys(config.layer_kinds))


def _ropes(kinds: tuple[LayerKind, ...]) -> list[Rope]:
    """Return the rotations that layers have, each once."""
    return [*dict.fromkeys(kind.rope for kind in kinds if kind.rope is not None)]


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
        return _places(c, jnp.arange(length)[None], length, Sight()), None
    own = jnp.ones(ids.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    if cache is None:
        sight = Sight(own, own)
    else:
        every = write(cache.segments, own, cache.filled, axis=1)
        sight = Sight(own, every, cache.filled)
    places = _positions(sight)
    # padding has positions too, but no text reaches them
    longest = jnp.where(own > 0, places, 0).max() + 1
    reach = longest if cache is None else cache.reach or cache.length
    return _places(c, places, reach, sight), sight.key_segments


def _places(c: DecoderConfig, positions: jax.Array, reach: int | jax.Array, sight: Sight) -> Places:
    kinds = kinds_of(c)
    angles = (rope.angles(positions, c.head_dim, reach) for rope in _ropes(kinds))
    return Places(tuple(angles), sight, kinds)


def _positions(sight: Sight) -> jax.Array:
    """Return the position of each token in its text, part of which may be in the cache."""
    own, every = sight.segments, sight.key_segments
    assert own is not None and every is not None
    slot = jnp.arange(own.shape[1]) + (0 if sight.first is None else sight.first)
    before = slot[:, None] >= jnp.arange(every.shape[1])[None, :]
    # One fused sum: the square is never in memory.
    return ((own[:, :, None] == every[:, None, :]) & before[None]).sum(-1) - 1
