"""BERT (Devlin et al., 2018, https://arxiv.org/abs/1810.04805) as an ordinary Flax Linen encoder.

RoBERTa (https://arxiv.org/abs/1907.11692) and XLM-RoBERTa are the same but for where positions
begin. `Bert` maps token ids to hidden states, `mean_pool` maps hidden states to one sentence
embedding; `lora_jax.models.load` reads a published checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.checks import is_integer, is_size, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.models import layers
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import Sight, attend
from lora_jax.models.decoder.config import EPSILONS
from lora_jax.models.on_mesh import Embedding, dot_general
from lora_jax.models.remat import policy_name, rematerialized

#: Values of `model_type` whose positions begin behind the padding token's id.
ROBERTAS = ("roberta", "xlm-roberta")


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, under the names in `config.json`.

    Attributes:
      first_position: the row of the position embeddings that the first token of a text has:
        RoBERTa's is the one behind the padding token's id.
      scan: stack the layers' parameters and run the layers in one `lax.scan`.
      remat: which activations each layer recomputes in the backward pass, as in `DecoderConfig`.

    Raises `ValueError` at construction for a size below one, for a width that the number of heads
    does not divide, for an activation that is not in `ACTIVATIONS`, for a first position beyond the
    table, or for an unknown `remat`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    first_position: int = 0
    scan: bool = False
    remat: bool | str = False

    def __post_init__(self) -> None:
        policy_name(self.remat)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != "first_position" and not is_size(value):
                raise ValueError(
                    f"BertConfig.{field.name} must be a positive int, got {shown_value(value)}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not is_within(self.layer_norm_eps, *EPSILONS):
            raise ValueError(
                "BertConfig.layer_norm_eps must be a positive number up to 1, "
                f"got {shown_value(self.layer_norm_eps)}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"BertConfig.hidden_act {shown_value(self.hidden_act)} is not one of "
                f"{sorted(ACTIVATIONS)}"
            )
        if not is_integer(self.first_position) or self.longest < 1 or self.first_position < 0:
            raise ValueError(
                "BertConfig.first_position must be an int from 0 to below max_position_embeddings "
                f"{self.max_position_embeddings}, got {shown_value(self.first_position)}"
            )

    @property
    def longest(self) -> int:
        """The number of tokens for which there are positions."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **extra_fields: Any) -> "BertConfig":
        """Read the sizes in a parsed `config.json`; `scan` and `remat` are not in the file.

        Raises `ValueError` for a missing size that has no default, for position embeddings other
        than absolute ones, which this encoder does not have, and for a model that is a decoder.
        """
        position = settings.get("position_embedding_type", "absolute")
        if position != "absolute":
            raise ValueError(f"position_embedding_type {shown_value(position)} is not supported")
        if settings.get("is_decoder"):
            raise ValueError(
                "is_decoder is true, but this encoder's tokens see those behind them too; only "
                "false is supported"
            )
        names = {f.name for f in fields(cls)} - {"first_position", "scan", "remat"}
        known = {name: settings[name] for name in names if name in settings} | extra_fields
        if settings.get("model_type") in ROBERTAS:
            padding = settings.get("pad_token_id", 1)
            if not is_integer(padding):
                raise ValueError(
                    f"pad_token_id must be an int, got {shown_value(padding)}: the positions of "
                    "RoBERTa's tokens begin behind it"
                )
            known["first_position"] = padding + 1
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"config.json is not a BERT configuration: {error}") from error


def positions_of(segments: jax.Array) -> jax.Array:
    """Return the position of each token in its own segment: `[..., length]` -> the same shape."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[-1]), segments.shape)
    # Signed, since `segments` may be a boolean mask, which has no -1 to start from.
    segments = segments.astype(jnp.int32)
    before = jnp.pad(
        segments[..., :-1],
        [*[(0, 0)] * (segments.ndim - 1), (1, 0)],
        "constant",
        constant_values=-1,
    )
    opens = segments != before
    return index - jax.lax.cummax(jnp.where(opens, index, 0), axis=segments.ndim - 1)


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, name=name, dot_general=dot_general)


class Embeddings(nn.Module):
    """Normalized sum of word, position and token type embeddings."""

    config: BertConfig

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array, types: jax.Array) -> jax.Array:
        """Map three integer arrays `[batch, length]` to `[batch, length, width]`."""
        c = self.config
        word = Embedding(c.vocab_size, c.hidden_size, name="word")(ids)
        position = Embedding(c.max_position_embeddings, c.hidden_size, name="position")(
            positions_of(segments) + c.first_position
        )
        kind = Embedding(c.type_vocab_size, c.hidden_size, name="type")(types)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")(word + position + kind)


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product self-attention with its output projection."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Mix each token with those of its segment.

        Args:
          x: `[batch, length, width]`.
          segments: integers or booleans `[batch, length]`.

        Returns:
          The same shape and dtype as `x`.
        """
        batch, length, width = x.shape
        heads = self.config.num_attention_heads

        def project(name: str) -> jax.Array:
            y = _dense(width, name)(x)
            return y.reshape(batch, length, heads, width // heads)

        query, key, value = project("query"), project("key"), project("value")
        mixed = attend(query, key, value, Sight(segments, segments), causal=False)
        return _dense(width, "output")(mixed.reshape(batch, length, width))


class BertLayer(nn.Module):
    """Attention, then a feed-forward network, each with a residual connection and a norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype, as `SelfAttention` does."""
        c = self.config
        norm = partial(nn.LayerNorm, epsilon=c.layer_norm_eps)
        x = norm(name="attention_norm")(x + SelfAttention(c, name="attention")(x, segments))
        y = ACTIVATIONS[c.hidden_act](_dense(c.intermediate_size, "intermediate")(x))
        return norm(name="output_norm")(x + _dense(c.hidden_size, "output")(y))


class Bert(nn.Module):
    """A BERT encoder without its pooler."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, ids: jax.Array, segments: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """Encode token ids.

        Args:
          ids: integers `[batch, length]`.
          segments: integers or booleans `[batch, length]`, 0 at padding. With one text per row it
            is the usual attention mask. Several texts can share a row, packed one after another
            and numbered 1, 2, ...: each sees only itself, and its positions start from 0.
          types: integers `[batch, length]`, BERT's token types; all zero by default.

        Returns:
          Hidden states `[batch, length, width]` in the parameters' dtype, meaningless at padding.

        Raises:
          ValueError: the rows are longer than the number of position embeddings.
        """
        c = self.config
        if ids.shape[1] > c.longest:
            but = f" but {c.first_position}" if c.first_position else ""
            raise ValueError(
                f"length {ids.shape[1]} is above max_position_embeddings "
                f"{c.max_position_embeddings}{but}"
            )
        types = jnp.zeros_like(ids) if types is None else types
        x = Embeddings(c, name="embeddings")(ids, segments, types)
        layer, count = rematerialized(BertLayer, c.remat, scan=c.scan), c.num_hidden_layers
        if c.scan:
            return layers.run(layer(c, name="layers"), count, x, segments)
        return layers.run([layer(c, name=f"layer_{i}") for i in range(count)], count, x, segments)


def mean_pool(
    hidden: jax.Array, segments: jax.Array, count: int = 1, normalize: bool = False
) -> jax.Array:
    """Average hidden states over the tokens of each segment: sentence embeddings.

    Args:
      hidden: `[batch, length, width]`, as `Bert` returns.
      segments: integers `[batch, length]`, as `Bert` takes.
      count: maximum number of segments per row, static.
      normalize: scale each embedding to unit length.

    Returns:
      `[batch, count, width]` in `hidden`'s dtype; entry `[:, i]` belongs to segment `i + 1` and
      is zero where a row has no such segment.
    """
    member = segments[:, None, :] == jnp.arange(1, count + 1)[None, :, None]
    total = jnp.einsum("bsl,blw->bsw", member.astype(hidden.dtype), hidden)
    mean = total / jnp.maximum(member.sum(axis=-1, keepdims=True), 1).astype(hidden.dtype)
    if not normalize:
        return mean
    # The floor is under the square root, so that an absent segment has a gradient of zero, not NaN.
    return mean * jax.lax.rsqrt(jnp.maximum((mean**2).sum(axis=-1, keepdims=True), 1e-24))
