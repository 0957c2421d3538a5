"""The Llama family (https://arxiv.org/abs/2302.13971) as an ordinary Flax Linen decoder.

`LlamaConfig` covers Llama, Mistral, Qwen2 and SmolLM2; `Llama` maps token ids to logits, with or
without a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.rope import Rope, rotate

#: For each model type: what its config.json means where it is silent.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"attention_bias": True, "max_position_embeddings": 32768},
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and kinds of a decoder of the Llama family, under the names that `config.json` uses.

    Attributes:
      num_key_value_heads: keys and values are shared by groups of query heads; by default there
        is one for each.
      head_dim: width of a head, by default `hidden_size / num_attention_heads`.
      attention_bias, output_bias: whether the projections to q, k and v, and the one of the
        attention's output, have a bias.
      sliding_window: how many tokens back a token sees, itself included; None is all of them.
      scan: keep the layers' parameters stacked and run them in one `lax.scan`.
      remat: compute each layer again in the backward pass instead of keeping its activations.
      dtype: what is computed in; norms, rotations and the softmax are in float32 whatever it is.
      param_dtype: what `init` makes parameters in.

    Raises `ValueError` at construction for a size below one, heads that do not divide, an odd
    width of a head, an activation other than `silu` or a dtype that is not in `DTYPES`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    REQUIRED: ClassVar = (
        *("vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads"),
    )

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        if self.num_key_value_heads == 0:
            fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim == 0 and isinstance(self.num_attention_heads, int):
            fill("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        self._check_types()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: rotations need an even head_dim, got {self.head_dim}")
        for name, allowed in (
            ("hidden_act", ("silu",)),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"LlamaConfig.{name} {getattr(self, name)!r} is not one of {list(allowed)}"
                )

    def _check_types(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            is_int = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if f.type == "int" and not is_int:
                raise ValueError(f"LlamaConfig.{f.name} must be a positive int, got {value!r}")
            if f.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"LlamaConfig.{f.name} must be true or false, got {value!r}")
        if not isinstance(self.rms_norm_eps, float) or not self.rms_norm_eps > 0:
            raise ValueError(
                f"LlamaConfig.rms_norm_eps must be a positive float, got {self.rms_norm_eps!r}"
            )
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(
                f"LlamaConfig.sliding_window must be a positive int or None, got {window!r}"
            )

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **fields_of_ours: Any) -> LlamaConfig:
        """Reads a parsed `config.json` of Llama, Mistral or Qwen2.

        Args:
          settings: the parsed file.
          **fields_of_ours: `scan`, `remat`, `dtype` and `param_dtype`, which the file does not
            decide.

        Raises:
          ValueError: for another `model_type`, for sizes that are missing (all are listed), for
            what `Rope` and `LlamaConfig` refuse, for windows in some of the layers only, and for
            quantized weights.
        """
        model_type = settings.get("model_type", "llama")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r} is not one of {sorted(MODEL_TYPES)}")
        if settings.get("quantization_config"):
            raise ValueError("config.json: a quantization_config: such weights are not supported")
        if missing := [name for name in cls.REQUIRED if settings.get(name) is None]:
            raise ValueError(f"config.json does not say {', '.join(missing)}")
        settings = MODEL_TYPES[model_type] | dict(settings)
        # `rope` and ours are no keys of the file, and `dtype` there is that of the weights
        own = {"rope", "scan", "remat", "dtype", "param_dtype", "output_bias", "sliding_window"}
        known = {f.name for f in fields(cls)} - own
        given = {name: settings[name] for name in known if settings.get(name) is not None}
        return cls(
            **given,
            rope=Rope.from_json(settings),
            output_bias=model_type == "llama" and given.get("attention_bias", False),
            sliding_window=_window(settings, model_type),
            **fields_of_ours,
        )


def _window(settings: Mapping[str, Any], model_type: str) -> int | None:
    """The sliding window that all layers have, or None."""
    window, layers = settings.get("sliding_window"), settings["num_hidden_layers"]
    if model_type == "llama" or window is None:
        return None
    slides = ["sliding_attention"] * layers
    if model_type == "qwen2":
        first = (
            settings.get("max_window_layers", 28) if settings.get("use_sliding_window") else layers
        )
        slides = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    slides = settings.get("layer_types") or slides
    if len(set(slides)) > 1:
        raise ValueError("config.json: a sliding window in some of the layers is not supported")
    return window if slides[0] == "sliding_attention" else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, as `Llama.init_cache` makes them.

    Attributes:
      layers: of each layer its keys and values `[batch, key-value heads, length, head_dim]`: a
        tuple with a pair a layer, or one pair with a leading axis for stacked layers.
      segments: int32 `[batch, length]`: which text each token belongs to.
      filled: int32 scalar, how many of the `length` slots are taken.
    """

    layers: Any
    segments: jax.Array
    filled: jax.Array

    @property
    def length(self) -> int:
        """How many tokens fit."""
        return self.segments.shape[1]


def _check_length(config: LlamaConfig, length: int) -> None:
    if length > config.max_position_embeddings:
        raise ValueError(
            f"length {length} is above max_position_embeddings {config.max_position_embeddings}"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Places:
    """Where the tokens of a call stand, the same for all layers."""

    cos: jax.Array  # [batch or 1, length, head_dim / 2]
    sin: jax.Array
    visible: jax.Array  # bool [batch or 1, length, slots]
    filled: jax.Array | None  # the first slot of a cache to write to


class Attention(nn.Module):
    """Causal attention with rotated queries and keys, and keys shared by groups of queries."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: _Places, cached: Any) -> tuple[jax.Array, Any]:
        """Mixes each token with those it can see.

        Args:
          x: `[batch, length, width]`.
          places: of the tokens.
          cached: keys and values of this layer `[batch, key-value heads, slots, head_dim]`, or
            None.

        Returns:
          The same shape and dtype as `x`, and the keys and values with those of `x` written in.
        """
        c = self.config
        batch, length, _ = x.shape
        groups, size = c.num_key_value_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            return _dense(c, heads * size, c.attention_bias, name)(x)

        query = project("query", c.num_attention_heads).reshape(batch, length, groups, -1, size)
        key = project("key", groups).reshape(batch, length, groups, size)
        value = project("value", groups).reshape(batch, length, groups, size)
        query, key = (rotate(t, places.cos, places.sin) for t in (query, key))
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if cached is not None:
            start = (0, 0, places.filled, 0)
            cached = key, value = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
                for old, new in zip(cached, (key, value), strict=True)
            )
        # The heads that share a key stand side by side: no key is repeated in memory.
        scores = jnp.einsum(
            "bqkgd,bktd->bkqgt", query, key.astype(c.dtype), preferred_element_type=jnp.float32
        )
        scores = jnp.where(places.visible[:, None, :, None], scores * size**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        mixed = jnp.einsum("bkqgt,bktd->bqkgd", weights, value.astype(c.dtype))
        mixed = mixed.reshape(batch, length, c.num_attention_heads * size)
        return _dense(c, c.hidden_size, c.output_bias, "output")(mixed), cached


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))` (https://arxiv.org/abs/2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, width]` -> the same shape and dtype."""
        c = self.config
        gate = _dense(c, c.intermediate_size, c.mlp_bias, "gate")(x)
        up = _dense(c, c.intermediate_size, c.mlp_bias, "up")(x)
        return _dense(c, c.hidden_size, c.mlp_bias, "down")(jax.nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then a feed-forward network, each behind a norm and with a residual connection."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, places: _Places, cached: Any) -> tuple[jax.Array, Any]:
        """As `Attention`."""
        c = self.config
        mixed, cached = Attention(c, name="attention")(
            _norm(c, "attention_norm")(x), places, cached
        )
        x = x + mixed
        return x + FeedForward(c, name="mlp")(_norm(c, "mlp_norm")(x)), cached


def _dense(c: LlamaConfig, width: int, bias: bool, name: str | None) -> nn.Dense:
    return nn.Dense(width, bias, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


def _norm(c: LlamaConfig, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(c.rms_norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


class Llama(nn.Module):
    """A decoder of the Llama family with its head.

    >>> config = LlamaConfig(
    ...     vocab_size=11, hidden_size=8, intermediate_size=16,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ... )
    >>> model, ids = Llama(config), jnp.array([[3, 1, 4]])
    >>> variables = model.init(jax.random.key(0), ids)
    >>> model.apply(variables, ids).shape
    (1, 3, 11)
    >>> cache = model.init_cache(batch=1, length=5)
    >>> logits, cache = model.apply(variables, ids, cache=cache)
    >>> logits, cache = model.apply(variables, jnp.array([[1]]), cache=cache)
    >>> logits.shape, int(cache.filled)
    ((1, 1, 11), 4)
    """

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        layer = nn.remat(Layer, prevent_cse=not c.scan) if c.remat else Layer
        self.embedding = nn.Embed(
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
        """An empty cache.

        Args:
          batch: how many rows.
          length: how many tokens a row may have in all, prompt and continuation. What is written
            beyond it overwrites the last ones.
          dtype: of keys and values; `config.dtype` by default.

        Raises:
          ValueError: for a length above `max_position_embeddings`.
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
        """Logits of the token that follows each token.

        Args:
          ids: integers `[batch, length]`.
          segments: integers `[batch, length]`, 0 at padding; ones by default. Several texts can
            share a row, one behind the other and numbered 1, 2, ...: each sees itself alone, its
            positions start from 0.
          cache: of the tokens before these, `init_cache` at first.

        Returns:
          Logits `[batch, length, vocabulary]` in `config.dtype`, those at padding without
          meaning; with a cache, the logits and the cache with these tokens added.

        Raises:
          ValueError: for more tokens than `max_position_embeddings`, or than the cache has slots.
        """
        if cache is None:
            return self.logits(self.hidden(ids, segments))
        x, cache = self.hidden(ids, segments, cache)
        return self.logits(x), cache

    def hidden(
        self, ids: jax.Array, segments: jax.Array | None = None, cache: Cache | None = None
    ) -> Any:
        """As `__call__`, but what the head is given: `[batch, length, width]`."""
        c = self.config
        places, segments = _places(c, ids, segments, cache)
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
        """The head alone: what `hidden` returns -> `[..., vocabulary]`."""
        if self.config.tie_word_embeddings:
            return self.embedding.attend(hidden)
        return self.head(hidden)


def _places(
    c: LlamaConfig, ids: jax.Array, segments: jax.Array | None, cache: Cache | None
) -> tuple[_Places, Any]:
    """Where tokens stand and what they see; and the segments of all slots."""
    length = ids.shape[1]
    _check_length(c, length)
    if cache is not None and length > cache.length:
        raise ValueError(f"{length} tokens do not fit into a cache of {cache.length}")
    filled = None if cache is None else cache.filled
    slots = length if cache is None else cache.length
    at = jnp.arange(length)[:, None] + (0 if filled is None else filled)
    back = at - jnp.arange(slots)
    visible = (back >= 0)[None]
    if segments is None and cache is None:
        positions = jnp.arange(length)[None]
    else:
        segments = jnp.ones(ids.shape, jnp.int32) if segments is None else segments
        segments = own = segments.astype(jnp.int32)
        if cache is not None:
            segments = jax.lax.dynamic_update_slice(cache.segments, own, (0, filled))
        visible &= own[:, :, None] == segments[:, None, :]
        positions = visible.sum(-1) - 1  # of a token in its own text
    if c.sliding_window is not None:
        visible &= back < c.sliding_window
    cos, sin = c.rope.angles(positions, c.head_dim)
    return _Places(cos, sin, visible, filled), segments
