"""The Llama family (https://arxiv.org/abs/2302.13971) as an ordinary Flax Linen decoder.

`Llama` maps token ids to logits, with or without a cache of keys and values. Its `LlamaConfig`
makes it Llama, Mistral, Qwen2 or SmolLM2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.attention import Sight, attend
from lora_jax.models.cache import Cache, write
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.on_mesh import Embedding, by_rows, dot_general
from lora_jax.models.remat import rematerialized
from lora_jax.models.rope import rotate


def _check_length(config: LlamaConfig, length: int) -> None:
    if length > config.max_position_embeddings:
        raise ValueError(
            f"length {length} is above max_position_embeddings {config.max_position_embeddings}"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Places:
    """Positions and visibility of the tokens of one call, the same for all layers."""

    cos: jax.Array  # [batch or 1, length, head_dim / 2]
    sin: jax.Array
    sight: Sight  # where they are in the cache, and what they see of it


class Attention(nn.Module):
    """Causal attention with rotary embeddings and grouped queries."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: _Places, cached: Any) -> tuple[jax.Array, Any]:
        """Mix each token with those it can see.

        Args:
          x: `[batch, length, width]`.
          places: of the tokens in `x`.
          cached: this layer's keys and values `[batch, key-value heads, slots, head_dim]`, or
            None.

        Returns:
          The same shape and dtype as `x`, and the keys and values including those of `x`.
        """
        c = self.config
        batch, length, _ = x.shape
        groups, size = c.num_key_value_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            return _dense(c, heads * size, c.attention_bias, name)(x)

        heads = c.num_attention_heads
        query = project("query", heads).reshape(batch, length, heads, size)
        key = project("key", groups).reshape(batch, length, groups, size)
        value = project("value", groups).reshape(batch, length, groups, size)
        query, key = (rotate(t, places.cos, places.sin) for t in (query, key))
        if cached is not None:
            first = jnp.asarray(places.sight.first)
            cached = tuple(
                write(old, new.swapaxes(1, 2), first, axis=2)
                for old, new in zip(cached, (key, value), strict=True)
            )
            key, value = (x.swapaxes(1, 2).astype(c.dtype) for x in cached)
        mixed = attend(query, key, value, places.sight, causal=True, window=c.sliding_window)
        mixed = mixed.reshape(batch, length, heads * size)
        return _dense(c, c.hidden_size, c.output_bias, "output")(mixed), cached


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))` (https://arxiv.org/abs/2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        c = self.config
        gate = _dense(c, c.intermediate_size, c.mlp_bias, "gate")(x)
        up = _dense(c, c.intermediate_size, c.mlp_bias, "up")(x)
        return _dense(c, c.hidden_size, c.mlp_bias, "down")(jax.nn.silu(gate) * up)


class LlamaLayer(nn.Module):
    """Attention, then a feed-forward network, each after a norm and with a residual connection."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: _Places, cached: Any) -> tuple[jax.Array, Any]:
        """Map tokens as `Attention` does, with the same arguments and results."""
        c = self.config
        mixed, cached = Attention(c, name="attention")(
            _norm(c, "attention_norm")(x), places, cached
        )
        x = by_rows(x + mixed)
        return by_rows(x + FeedForward(c, name="mlp")(_norm(c, "mlp_norm")(x))), cached


def _dense(c: LlamaConfig, width: int, bias: bool, name: str | None) -> nn.Dense:
    return nn.Dense(
        width, bias, dtype=c.dtype, param_dtype=c.param_dtype, name=name, dot_general=dot_general
    )


def _norm(c: LlamaConfig, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(c.rms_norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


class Llama(nn.Module):
    """A decoder of the Llama family, with its output head.

    >>> config = LlamaConfig(
    ...     vocab_size=11, hidden_size=8, intermediate_size=16,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ... )
    >>> model, ids = Llama(config), jnp.array([[3, 1, 4]])
    >>> variables, apply = jax.jit(model.init)(jax.random.key(0), ids), jax.jit(model.apply)
    >>> apply(variables, ids).shape
    (1, 3, 11)
    >>> cache = model.init_cache(batch=1, length=5)
    >>> logits, cache = apply(variables, ids, cache=cache)
    >>> logits, cache = apply(variables, jnp.array([[1]]), cache=cache)
    >>> logits.shape, int(cache.filled)
    ((1, 1, 11), 4)
    """

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        layer = rematerialized(LlamaLayer, c.remat, scan=c.scan)
        self.embedding = Embedding(
            c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype
        )
        if c.scan:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_hidden_layers,
            )(c)
        else:
            self.layer = [layer(c) for _ in range(c.num_hidden_layers)]
        self.norm = _norm(c, None)
        if not c.tie_word_embeddings:
            self.head = _dense(c, c.vocab_size, False, None)

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """Create an empty cache.

        Args:
          batch: number of rows.
          length: maximum number of tokens per row, prompt and continuation together. Tokens
            written beyond it overwrite the last ones.
          dtype: dtype of keys and values; `config.dtype` by default.

        Raises:
          ValueError: `length` is above `max_position_embeddings`.
        """
        c = self.config
        _check_length(c, length)
        shape = (batch, c.num_key_value_heads, length, c.head_dim)

        def pair(*stack: int) -> tuple[jax.Array, jax.Array]:
            zeros = partial(jnp.zeros, (*stack, *shape), dtype or c.dtype)
            return zeros(), zeros()  # two buffers: both may be donated

        count = c.num_hidden_layers
        layers = pair(count) if c.scan else tuple(pair() for _ in range(count))
        return Cache(layers, jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))

    def __call__(
        self, ids: jax.Array, segments: jax.Array | None = None, cache: Cache | None = None
    ) -> Any:
        """Compute the logits of the token after each token.

        Args:
          ids: integers `[batch, length]`.
          segments: integers `[batch, length]`, 0 at padding; ones by default. Several texts can
            share a row, packed one after another and numbered 1, 2, ...: each sees only itself,
            and its positions start from 0.
          cache: the tokens before these; `init_cache` at first.

        Returns:
          Logits `[batch, length, vocabulary]` in `config.dtype`, meaningless at padding; with a
          cache, the logits and the cache with these tokens added.

        Raises:
          ValueError: there are more tokens than `max_position_embeddings` or slots in the cache.
        """
        if cache is None:
            return self.logits(self.hidden(ids, segments))
        x, cache = self.hidden(ids, segments, cache)
        return self.logits(x), cache

    def hidden(
        self, ids: jax.Array, segments: jax.Array | None = None, cache: Cache | None = None
    ) -> Any:
        """Compute the input of the head, `[batch, length, width]`; arguments as in `__call__`."""
        c = self.config
        places, segments = _locate(c, ids, segments, cache)
        x = self.embedding(ids)
        cached = None if cache is None else cache.layers
        if c.scan:
            x, cached = self.layers(x, places, cached)
        else:
            pairs = [None] * c.num_hidden_layers if cached is None else cached
            written = []
            for layer, pair in zip(self.layer, pairs, strict=True):
                x, pair = layer(x, places, pair)
                written.append(pair)
            cached = tuple(written)
        x = self.norm(x)
        if cache is None:
            return x
        return x, Cache(cached, segments, cache.filled + ids.shape[1])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the head to what `hidden` returns: `[..., width]` -> `[..., vocabulary]`."""
        if self.config.tie_word_embeddings:
            return self.embedding.attend(hidden)
        return self.head(hidden)


def _locate(
    c: LlamaConfig, ids: jax.Array, segments: jax.Array | None, cache: Cache | None
) -> tuple[_Places, Any]:
    """Work out where tokens are and what they see; also return the segments of all slots."""
    length = ids.shape[1]
    _check_length(c, length)
    if cache is not None and length > cache.length:
        raise ValueError(f"{length} tokens do not fit into a cache with {cache.length} slots")
    if segments is None and cache is None:
        places = jnp.arange(length)[None]
        return _Places(*c.rope.angles(places, c.head_dim), Sight()), None
    own = jnp.ones(ids.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    if cache is None:
        sight = Sight(own, own)
    else:
        every = write(cache.segments, own, cache.filled, axis=1)
        sight = Sight(own, every, cache.filled)
    cos, sin = c.rope.angles(_positions(sight), c.head_dim)
    return _Places(cos, sin, sight), sight.key_segments


def _positions(sight: Sight) -> jax.Array:
    """Return the position of each token in its text, part of which may be in the cache."""
    own, every = sight.segments, sight.key_segments
    assert own is not None and every is not None
    slot = jnp.arange(own.shape[1]) + (0 if sight.first is None else sight.first)
    before = slot[:, None] >= jnp.arange(every.shape[1])[None, :]
    # One fused sum: the square is never in memory.
    return ((own[:, :, None] == every[:, None, :]) & before[None]).sum(-1) - 1
