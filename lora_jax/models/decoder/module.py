"""A decoder as an ordinary Flax Linen module; its configuration says of which family.

The families are those of Llama (https://arxiv.org/abs/2302.13971): `Decoder` maps token ids to
logits, with or without a cache of keys and values.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.sharding.meshes import has_explicit_mesh
from lora_jax.models.cache import Cache
from lora_jax.models.decoder.config import DecoderConfig, LayerKind
from lora_jax.models.decoder.layer import DecoderLayer
from lora_jax.models.decoder.parts import capped, dense, norm
from lora_jax.models.decoder.places import check_length, kinds_of, locate
from lora_jax.models.decoder.router_load import ROUTER
from lora_jax.models.layers import scanned
from lora_jax.models.on_mesh import Embedding
from lora_jax.models.remat import rematerialized


class Decoder(nn.Module):
    """A decoder with its output head.

    >>> config = DecoderConfig(
    ...     vocab_size=11, hidden_size=8, intermediate_size=16,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ... )
    >>> model, ids = Decoder(config), jnp.array([[3, 1, 4]])
    >>> variables, apply = jax.jit(model.init)(jax.random.key(0), ids), jax.jit(model.apply)
    >>> apply(variables, ids).shape
    (1, 3, 11)
    >>> cache = model.init_cache(batch=1, length=5)
    >>> logits, cache = apply(variables, ids, cache=cache)
    >>> logits, cache = apply(variables, jnp.array([[1]]), cache=cache)
    >>> logits.shape, int(cache.filled)
    ((1, 1, 11), 4)
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        layer = rematerialized(DecoderLayer, c.remat, scan=c.scan)
        self.embedding = Embedding(
            c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype
        )
        if c.scan:
            stack = scanned(layer, c.num_hidden_layers, shared=1, each=2, more=[ROUTER])
            self.layers = stack(c, self._only_kind())
        else:
            self.layer = [layer(c, kind) for kind in c.layer_kinds]
        self.norm = norm(c, None)
        if not c.tie_word_embeddings:
            self.head = dense(c, c.vocab_size, False, None)

    @nn.nowrap
    def init_cache(
        self, batch: int, length: int, dtype: Any = None, reach: int | None = None
    ) -> Cache:
        """Create an empty cache.

        Args:
          batch: number of rows.
          length: maximum number of tokens per row, prompt and continuation together. Tokens
            written beyond it overwrite the last ones.
          dtype: dtype of keys and values; `config.dtype` by default.
          reach: how long texts can become, where longer caches take over; `length` by default.

        Raises:
          ValueError: `length` is above `max_position_embeddings`.
        """
        c = self.config
        check_length(c, length)
        shape = (batch, c.num_key_value_heads, length, c.head_dim)

        def pair(*stack: int) -> tuple[jax.Array, jax.Array]:
            zeros = partial(jnp.zeros, (*stack, *shape), dtype or c.dtype)
            return zeros(), zeros()  # two buffers: both may be donated

        count = c.num_hidden_layers
        layers = pair(count) if c.scan else tuple(pair() for _ in range(count))
        segments, filled = jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32)
        return Cache(layers, segments, filled, reach)

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
          ValueError: there are more tokens than `max_position_embeddings` or slots in the cache; or
            the model has experts, and the mesh explicit axes.
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
        places, segments = locate(c, ids, segments, cache)
        x = self.embedding(ids)
        if c.experts is not None and has_explicit_mesh(x):
            raise ValueError(
                "a model with experts sorts its tokens by expert, which JAX does not do along the "
                "explicit axes of a mesh; make it with axis_types=(AxisType.Auto, ...)"
            )
        if c.embedding_multiplier != 1.0:
            x = x * jnp.asarray(c.embedding_multiplier, x.dtype)
        cached = None if cache is None else cache.layers
        if c.scan:
            x, cached = self.layers(x, places, cached, self._kind_numbers())
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
        return x, Cache(cached, segments, cache.filled + ids.shape[1], cache.reach)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the head to what `hidden` returns: `[..., width]` -> `[..., vocabulary]`."""
        tied = self.config.tie_word_embeddings
        return self.finish(self.embedding.attend(hidden) if tied else self.head(hidden))

    @nn.nowrap
    def finish(self, products: jax.Array) -> jax.Array:
        """Make logits of the products of hidden states and the head, which a family may cap."""
        c = self.config
        if c.logits_scaling != 1.0:
            products = products / c.logits_scaling
        return capped(products, c.final_cap)

    @nn.nowrap
    def _only_kind(self) -> LayerKind | None:
        """Return the kind of all layers, None if they differ."""
        kinds = kinds_of(self.config)
        return kinds[0] if len(kinds) == 1 else None

    @nn.nowrap
    def _kind_numbers(self) -> jax.Array | None:
        """Return the number of each layer's kind, `[layers]`, None if all are alike."""
        kinds = kinds_of(self.config)
        if len(kinds) == 1:
            return None
        return jnp.asarray([kinds.index(kind) for kind in self.config.layer_kinds], jnp.int32)
