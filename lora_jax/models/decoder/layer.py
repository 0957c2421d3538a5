"""One layer of a decoder: attention and a feed-forward network."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.attention import Sight, attend
from lora_jax.models.cache import write
from lora_jax.models.decoder.config import DecoderConfig, LayerKind
from lora_jax.models.decoder.mixture import MixtureOfExperts
from lora_jax.models.decoder.parts import ACTIVATIONS, dense, norm
from lora_jax.models.decoder.places import Places
from lora_jax.models.on_mesh import by_rows
from lora_jax.models.rope import rotate


class Attention(nn.Module):
    """Causal attention with rotary embeddings and grouped queries."""

    config: DecoderConfig
    kind: LayerKind | None = None  # None in a scan over layers that differ

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, cached: Any, which: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Mix each token with those it can see.

        Args:
          x: `[batch, length, width]`.
          places: of the tokens in `x`.
          cached: this layer's keys and values `[batch, key-value heads, slots, head_dim]`, or
            None.
          which: the number of the layer's kind in `places.kinds`, where `kind` is None.

        Returns:
          The same shape and dtype as `x`, and the keys and values including those of `x`.
        """
        c = self.config
        query, key, value = self._project(x)
        if c.qk_norm == "head":
            query, key = norm(c, "query_norm")(query), norm(c, "key_norm")(key)
        query, key = self._rotate(places, which, query, key)
        if cached is not None:
            first = jnp.asarray(places.sight.first)
            cached = tuple(
                write(old, new.swapaxes(1, 2), first, axis=2)
                for old, new in zip(cached, (key, value), strict=True)
            )
            key, value = (x.swapaxes(1, 2).astype(c.dtype) for x in cached)
        mixed = self._attend(places, which, query, key, value)
        mixed = mixed.reshape(*x.shape[:2], c.num_attention_heads * c.head_dim)
        return dense(c, c.hidden_size, c.output_bias, "output")(mixed), cached

    def _project(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries, keys and values, `[batch, length, their heads, head_dim]` each."""
        c = self.config
        counts = {"query": c.num_attention_heads, "key": c.num_key_value_heads}
        counts["value"] = c.num_key_value_heads
        by_head = lambda flat: flat.reshape(*x.shape[:2], -1, c.head_dim)
        if c.fused:
            widths = [count * c.head_dim for count in counts.values()]
            flat = dense(c, sum(widths), c.attention_bias, "query_key_value")(x)
            ends = (widths[0], widths[0] + widths[1])
            return tuple(by_head(part) for part in jnp.split(flat, ends, axis=-1))
        found = []
        for name, count in counts.items():
            flat = dense(c, count * c.head_dim, c.attention_bias, name)(x)
            if c.qk_norm == "width" and name != "value":
                flat = norm(c, f"{name}_norm")(flat)
            found.append(by_head(flat))
        return tuple(found)

    def _rotate(
        self, places: Places, which: jax.Array | None, *xs: jax.Array
    ) -> tuple[jax.Array, ...]:
        angles = places.angles_of(self.kind) if which is None else places.chosen_angles(which)
        return xs if angles is None else tuple(rotate(x, *angles) for x in xs)

    def _attend(
        self,
        places: Places,
        which: jax.Array | None,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> jax.Array:
        c = self.config
        kinds = [self.kind] if which is None else places.kinds
        windows = [kind.window for kind in kinds if kind is not None]
        sinks = None
        if c.sinks:
            zeros, heads = nn.initializers.zeros, c.num_attention_heads
            sinks = self.param("sinks", zeros, (heads,), c.param_dtype)

        def of_window(
            window: int | None, sight: Sight, query: jax.Array, key: jax.Array, value: jax.Array
        ) -> jax.Array:
            return attend(
                *(query, key, value, sight),
                causal=True,
                window=window,
                scale=c.attention_scale,
                cap=c.attention_cap,
                sinks=sinks,
            )

        distinct = [*dict.fromkeys(windows)]
        branches = [partial(of_window, window) for window in distinct]
        if which is None or len(branches) == 1:
            return branches[0](places.sight, query, key, value)
        number = jnp.asarray([distinct.index(window) for window in windows])[which]
        return jax.lax.switch(number, branches, places.sight, query, key, value)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))` (https://arxiv.org/abs/2002.05202), or with GELU."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        c = self.config
        if c.fused:
            both = dense(c, 2 * c.intermediate_size, c.mlp_bias, "gate_up")(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = dense(c, c.intermediate_size, c.mlp_bias, "gate")(x)
            up = dense(c, c.intermediate_size, c.mlp_bias, "up")(x)
        hidden = ACTIVATIONS[c.hidden_act](gate) * up
        return dense(c, c.hidden_size, c.mlp_bias, "down")(hidden)


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward network, each with norms and a residual connection."""

    config: DecoderConfig
    kind: LayerKind | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, places: Places, cached: Any, which: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Map tokens as `Attention` does, with the same arguments and results."""
        c = self.config
        attention = Attention(c, self.kind, name="attention")
        mixed, cached = attention(self._before(x, "attention"), places, cached, which)
        x = self._add(x, mixed, "attention")
        before = self._before(x, "mlp")
        if c.experts is None or (self.kind is not None and self.kind.dense):
            mixed = FeedForward(c, name="mlp")(before)
        else:
            mixed = MixtureOfExperts(c, name="mlp")(before, places.sight.segments)
        return self._add(x, mixed, "mlp"), cached

    def _before(self, x: jax.Array, part: str) -> jax.Array:
        c = self.config
        return x if c.norms == "post" else norm(c, f"{part}_norm")(x)

    def _add(self, x: jax.Array, mixed: jax.Array, part: str) -> jax.Array:
        c = self.config
        if c.norms != "pre":
            mixed = norm(c, f"{part}_post_norm")(mixed)
        if c.residual_multiplier != 1.0:
            mixed = mixed * c.residual_multiplier
        return by_rows(x + mixed)
