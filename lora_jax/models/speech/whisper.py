"""Whisper (Radford et al., 2022, https://arxiv.org/abs/2212.04356) as an ordinary Flax module.

An encoder turns a log-mel spectrogram into states, and a decoder with attention to those states
gives the logits of the next token of what is said.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import Sight, attend
from lora_jax.models.cache import write
from lora_jax.models.layers import run, scanned
from lora_jax.models.on_mesh import Embedding, by_rows, dot_general
from lora_jax.models.remat import rematerialized
from lora_jax.models.speech.cache import SpeechCache
from lora_jax.models.speech.config import WhisperConfig

_EPSILON = 1e-5
_ALL = Sight()


def _dense(width: int, bias: bool = True) -> nn.Dense:
    return nn.Dense(width, bias, dot_general=dot_general)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON)


class Attention(nn.Module):
    """Multi-head attention whose keys have no bias."""

    width: int
    heads: int

    def setup(self) -> None:
        self.query, self.value, self.output = (_dense(self.width) for _ in range(3))
        self.key = _dense(self.width, bias=False)

    def pair(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values of `[batch, length, width]`."""
        return self._by_head(self.key(x)), self._by_head(self.value(x))

    def __call__(
        self, x: jax.Array, pair: Any, sight: Sight = _ALL, causal: bool = False
    ) -> jax.Array:
        """Mix keys and values for each token: `[batch, length, width]` -> the same shape."""
        query = self._by_head(self.query(x))
        key, value = (y.astype(query.dtype) for y in pair)
        mixed = attend(query, key, value, sight, causal=causal)
        return self.output(mixed.reshape(x.shape))

    def _by_head(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, self.width // self.heads)


class FeedForward(nn.Module):
    """`down(activation(up(x)))`."""

    width: int
    inner: int
    activation: str

    def setup(self) -> None:
        self.up, self.down = _dense(self.inner), _dense(self.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network, each after a norm and with a residual connection."""

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(c.d_model, c.encoder_attention_heads)
        self.mlp = FeedForward(c.d_model, c.encoder_ffn_dim, c.activation_function)
        self.attention_norm, self.mlp_norm = _norm(), _norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, states, width]` to the same shape and dtype."""
        y = self.attention_norm(x)
        x = by_rows(x + self.attention(y, self.attention.pair(y)))
        return by_rows(x + self.mlp(self.mlp_norm(x)))


class Encoder(nn.Module):
    """Two convolutions, the second of which halves the number of frames, and layers."""

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        self.conv1 = nn.Conv(c.d_model, (3,), padding=1)
        self.conv2 = nn.Conv(c.d_model, (3,), 2, padding=1)
        shape = (c.max_source_positions, c.d_model)
        self.position = self.param("position", nn.initializers.normal(0.02), shape)
        layer = rematerialized(EncoderLayer, c.remat, scan=c.scan)
        if c.scan:
            self.layers = layer(c)
        else:
            self.layer = [layer(c) for _ in range(c.encoder_layers)]
        self.norm = _norm()

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map `[batch, frames, mel bins]` to `[batch, states, width]`."""
        c = self.config
        if features.shape[1:] != (c.frames, c.num_mel_bins):
            raise ValueError(
                f"features must be [batch, {c.frames}, {c.num_mel_bins}], got {features.shape}; "
                "models.log_mel makes them of a recording"
            )
        gelu, x = ACTIVATIONS["gelu"], features.astype(self.position.dtype)
        x = gelu(self.conv2(gelu(self.conv1(x)))) + self.position[None]
        return self.norm(run(self.layers if c.scan else self.layer, c.encoder_layers, x))


class DecoderLayer(nn.Module):
    """Causal attention, attention to the recording, and a feed-forward network."""

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(c.d_model, c.decoder_attention_heads)
        self.cross = Attention(c.d_model, c.decoder_attention_heads)
        self.mlp = FeedForward(c.d_model, c.decoder_ffn_dim, c.activation_function)
        self.attention_norm, self.cross_norm, self.mlp_norm = _norm(), _norm(), _norm()

    def __call__(
        self, x: jax.Array, sight: Sight, heard: Any, cached: Any
    ) -> tuple[jax.Array, Any]:
        """Map `[batch, length, width]`, and return the keys and values with those of `x`."""
        y = self.attention_norm(x)
        pair = self.attention.pair(y)
        if cached is not None:
            first = jnp.asarray(sight.first)
            cached = tuple(
                write(old, new.swapaxes(1, 2), first, axis=2)
                for old, new in zip(cached, pair, strict=True)
            )
            pair = tuple(old.swapaxes(1, 2).astype(y.dtype) for old in cached)
        x = by_rows(x + self.attention(y, pair, sight, causal=True))
        x = by_rows(x + self.cross(self.cross_norm(x), heard))
        return by_rows(x + self.mlp(self.mlp_norm(x))), cached


class Decoder(nn.Module):
    """The decoder with its output head, which is tied to the embedding."""

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = Embedding(c.vocab_size, c.d_model)
        shape = (c.max_target_positions, c.d_model)
        self.position = self.param("position", nn.initializers.normal(0.02), shape)
        layer = rematerialized(DecoderLayer, c.remat, scan=c.scan)
        if c.scan:
            self.layers = layer(c)
        else:
            self.layer = [layer(c) for _ in range(c.decoder_layers)]
        self.norm = _norm()

    def hear(self, states: jax.Array) -> Any:
        """Return the keys and values of a recording, a pair for each layer or a stacked one."""
        if not self.config.scan:
            return tuple(layer.cross.pair(states) for layer in self.layer)
        pair = lambda layer, carry, states: (carry, layer.cross.pair(states))
        return scanned(pair, self.config.decoder_layers, shared=1)(self.layers, (), states)[1]

    def __call__(
        self, ids: jax.Array, heard: Any, sight: Sight, cached: Any = None
    ) -> tuple[jax.Array, Any]:
        """Return logits `[batch, length, vocabulary]`, and the keys and values of the tokens."""
        length = ids.shape[1]
        first = 0 if sight.first is None else sight.first
        position = jax.lax.dynamic_slice_in_dim(self.position, first, length)
        x, written = self._run(self.embedding(ids) + position[None], sight, heard, cached)
        return self.embedding.attend(self.norm(x)), written

    def _run(self, x: jax.Array, sight: Sight, heard: Any, cached: Any) -> tuple[jax.Array, Any]:
        """Apply the layers, and return the keys and values of the tokens too."""
        count = self.config.decoder_layers
        if self.config.scan:
            one = lambda layer, *args: layer(*args)
            return scanned(one, count, shared=1, each=2)(self.layers, x, sight, heard, cached)
        written = []
        for i, layer in enumerate(self.layer):
            x, pair = layer(x, sight, heard[i], None if cached is None else cached[i])
            written.append(pair)
        return x, tuple(written)


class Whisper(nn.Module):
    """Whisper with its output head.

    >>> config = WhisperConfig(
    ...     vocab_size=11, num_mel_bins=4, d_model=8, encoder_layers=1, encoder_attention_heads=2,
    ...     encoder_ffn_dim=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
    ...     max_source_positions=6, max_target_positions=5,
    ... )
    >>> model, features, ids = Whisper(config), jnp.ones((1, 12, 4)), jnp.array([[3, 1]])
    >>> variables = jax.jit(model.init)(jax.random.key(0), ids, features=features)
    >>> jax.eval_shape(lambda v: model.apply(v, ids, features=features), variables).shape
    (1, 2, 11)
    """

    config: WhisperConfig

    def setup(self) -> None:
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def __call__(
        self,
        ids: jax.Array,
        segments: jax.Array | None = None,
        cache: SpeechCache | None = None,
        *,
        features: jax.Array | None = None,
    ) -> Any:
        """Compute the logits of the token after each token.

        Args:
          ids: integers `[batch, length]`.
          segments: integers `[batch, length]`, 0 at padding; ones by default.
          cache: of `start`, with the tokens before these.
          features: in place of a cache, `[batch, frames, mel bins]`, as `models.log_mel` makes.

        Returns:
          Logits `[batch, length, vocabulary]` in the parameters' dtype, meaningless at padding;
          with a cache, the logits and the cache with these tokens added.

        Raises:
          ValueError: there are more tokens than positions, the features have another size, or
            there are not features or a cache.
        """
        if (cache is None) == (features is None):
            raise ValueError("Whisper needs either features= of the recording, or cache= of start")
        self._check_length(ids.shape[1])
        own = None if segments is None else segments.astype(jnp.int32)
        if cache is None:
            assert features is not None
            heard = self.decoder.hear(self.encoder(features))
            return self.decoder(ids, heard, Sight(own, own))[0]
        if ids.shape[1] > cache.length:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit into a cache with {cache.length} slots"
            )
        own = jnp.ones(ids.shape, jnp.int32) if own is None else own
        every = write(cache.segments, own, cache.filled, axis=1)
        sight = Sight(own, every, cache.filled)
        logits, layers = self.decoder(ids, cache.heard, sight, cache.layers)
        return logits, SpeechCache(layers, cache.heard, every, cache.filled + ids.shape[1])

    def start(self, features: jax.Array, length: int) -> SpeechCache:
        """Encode recordings, to generate up to `length` tokens of each, the prompt's included.

        Raises:
          ValueError: there are fewer positions, or the features have another size.
        """
        self._check_length(length)
        c = self.config
        heard = self.decoder.hear(self.encoder(features))
        batch, size = features.shape[0], c.d_model // c.decoder_attention_heads
        stack = (c.decoder_layers,) if c.scan else ()
        shape = (*stack, batch, c.decoder_attention_heads, length, size)
        dtype = jax.tree.leaves(heard)[0].dtype
        pair = lambda: (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        empty = pair() if c.scan else tuple(pair() for _ in heard)
        segments = jnp.zeros((batch, length), jnp.int32)
        return SpeechCache(empty, heard, segments, jnp.zeros((), jnp.int32))

    def _check_length(self, length: int) -> None:
        if length > self.config.longest:
            raise ValueError(f"length {length} is above max_target_positions {self.config.longest}")
