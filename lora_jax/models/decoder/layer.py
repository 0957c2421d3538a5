"""One layer of a decoder: attention and a feed-forward network."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.attention import attend
from lora_jax.models.cache import write
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.parts import dense, norm
from lora_jax.models.decoder.places import Places
from lora_jax.models.on_mesh import by_rows
from lora_jax.models.rope import rotate


class Attention(nn.Module):
    """Causal attention with rotary embeddings and grouped queries."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: Places, cached: Any) -> tuple[jax.Array, Any]:
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
            return dense(c, heads * size, c.attention_bias, name)(x)

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
        return dense(c, c.hidden_size, c.output_bias, "output")(mixed), cached


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))` (https://arxiv.org/abs/2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        c = self.config
        gate = dense(c, c.intermediate_size, c.mlp_bias, "gate")(x)
        up = dense(c, c.intermediate_size, c.mlp_bias, "up")(x)
        return dense(c, c.hidden_size, c.mlp_bias, "down")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward network, each after a norm and with a residual connection."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: Places, cached: Any) -> tuple[jax.Array, Any]:
        """Map tokens as `Attention` does, with the same arguments and results."""
        c = self.config
        mixed, cached = Attention(c, name="attention")(norm(c, "attention_norm")(x), places, cached)
        x = by_rows(x + mixed)
        return by_rows(x + FeedForward(c, name="mlp")(norm(c, "mlp_norm")(x))), cached
