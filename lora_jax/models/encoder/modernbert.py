"""ModernBERT (Warner et al., 2024, https://arxiv.org/abs/2412.13663) as an ordinary Flax encoder.

Rotary positions, layers that see a window between layers that see all, norms before each block, and
linear layers that make several things at once: the leaf of queries, keys and values is
`[in, 3, heads · size]`, so that each of the three can be sharded along its heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
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
from lora_jax.models.encoder.bert import positions_of
from lora_jax.models.on_mesh import Embedding, dot_general
from lora_jax.models.remat import policy_name, rematerialized
from lora_jax.models.rope import Rope, rotate

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)


@dataclass(frozen=True)
class ModernBertConfig:
    """Configuration of a ModernBERT encoder, under the names in `config.json`.

    Attributes:
      layer_types: of each layer `full_attention` or `sliding_attention`.
      local_attention: how many tokens a token of a layer with a window sees, half of them on each
        side of it.
      global_rope, local_rope: the angles of the two sorts of layers.
      scan: stack the parameters of all layers but the first, which has one norm less, and run them
        in one `lax.scan`.
      remat: which activations each layer recomputes in the backward pass, as in `DecoderConfig`.

    Raises `ValueError` at construction for a size below one, for heads of an odd size or that do
    not divide the width, for an activation that is not in `ACTIVATIONS`, if `layer_types` does not
    name each layer's, or for an unknown `remat`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_types: tuple[str, ...]
    max_position_embeddings: int = 8192
    local_attention: int = 128
    hidden_activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    global_rope: Rope = field(default_factory=lambda: Rope(160_000.0))
    local_rope: Rope = field(default_factory=Rope)
    scan: bool = False
    remat: bool | str = False

    def __post_init__(self) -> None:
        policy_name(self.remat)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not is_size(value):
                raise ValueError(
                    f"ModernBertConfig.{f.name} must be a positive int, got {shown_value(value)}"
                )
            if f.type is bool and not isinstance(value, bool):
                raise ValueError(
                    f"ModernBertConfig.{f.name} must be true or false, got {shown_value(value)}"
                )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"ModernBertConfig: hidden_size {self.hidden_size} is not an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not is_within(self.norm_eps, *EPSILONS):
            raise ValueError(
                "ModernBertConfig.norm_eps must be a positive number up to 1, "
                f"got {shown_value(self.norm_eps)}"
            )
        if not isinstance(self.hidden_activation, str) or self.hidden_activation not in ACTIVATIONS:
            raise ValueError(
                f"ModernBertConfig.hidden_activation {shown_value(self.hidden_activation)} is not "
                f"one of {sorted(ACTIVATIONS)}"
            )
        if len(self.layer_types) != self.num_hidden_layers or not all(
            isinstance(kind, str) and kind in (LOCAL, GLOBAL) for kind in self.layer_types
        ):
            raise ValueError(
                f"ModernBertConfig.layer_types must be {self.num_hidden_layers} of {GLOBAL!r} and "
                f"{LOCAL!r}, got {shown_value(self.layer_types)}"
            )

    @property
    def longest(self) -> int:
        """The number of tokens that the model was made for."""
        return self.max_position_embeddings

    @property
    def window(self) -> int:
        """How far a token of a layer with a window sees on each side, itself included."""
        return self.local_attention // 2 + 1

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **extra_fields: Any) -> "ModernBertConfig":
        """Read a parsed `config.json` of transformers 4 or 5; `scan` and `remat` are not in it.

        Raises:
          ValueError: sizes are missing (all are listed), or `ModernBertConfig` or `Rope` refuses a
            value.
        """
        if missing := [name for name in _REQUIRED if settings.get(name) is None]:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        own = {"layer_types", "global_rope", "local_rope", "scan", "remat"}
        names = {f.name for f in fields(cls)} - own
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        return cls(
            **given,
            **extra_fields,
            layer_types=_layer_types(settings),
            global_rope=_rope(settings, GLOBAL, "global_rope_theta", 160_000.0),
            local_rope=_rope(settings, LOCAL, "local_rope_theta", 10_000.0),
        )


def _layer_types(settings: Mapping[str, Any]) -> tuple[str, ...]:
    given = settings.get("layer_types")
    if given is not None:
        if not isinstance(given, list):
            raise ValueError(f"layer_types must be a list of names, got {shown_value(given)}")
        return tuple(given)
    count, every = settings["num_hidden_layers"], settings.get("global_attn_every_n_layers", 3)
    if not is_integer(count) or not is_size(every):
        raise ValueError(
            "num_hidden_layers and global_attn_every_n_layers must be positive ints, got "
            f"{shown_value(count)} and {shown_value(every)}"
        )
    return tuple(LOCAL if i % every else GLOBAL for i in range(count))


def _rope(settings: Mapping[str, Any], kind: str, older: str, theta: float) -> Rope:
    every = settings.get("rope_parameters") or {}
    given = every.get(kind) if isinstance(every, Mapping) else None
    given = given or settings.get("rope_scaling") or {}
    if not isinstance(every, Mapping) or not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters must be a mapping, got {shown_value(every)}")
    theta = settings.get(older) or theta
    return Rope.from_json({"rope_parameters": {"rope_theta": theta, **given}})


def _norm(c: ModernBertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.norm_eps, use_bias=c.norm_bias, name=name)


def _several(parts: int, width: int, bias: bool, name: str) -> nn.DenseGeneral:
    """Return a linear layer with an output `[..., parts, width]`."""
    return nn.DenseGeneral((parts, width), use_bias=bias, name=name, dot_general=dot_general)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kind:
    """What the attention of two layers may differ in.

    Attributes:
      angles: of the rotation, cosines and sines.
      is_local: 1 with a window, 0 without, of a layer in a scan over both; otherwise None.
      window: how far a token sees, if `is_local` is None; None for all.
    """

    angles: tuple[jax.Array, jax.Array]
    is_local: jax.Array | None = None
    window: int | None = field(default=None, metadata={"static": True})


def _attend(
    sight: Sight, window: int | None, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    return attend(query, key, value, sight, causal=False, window=window)


class Attention(nn.Module):
    """Attention with rotary positions to all tokens of a segment, or to those in a window."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, kind: "Kind") -> jax.Array:
        """Mix each token with those that it sees: `[batch, length, width]` -> the same."""
        c = self.config
        batch, length, width = x.shape
        heads = c.num_attention_heads
        made = _several(3, width, c.attention_bias, "qkv")(x)
        query, key, value = (
            made[:, :, i].reshape(batch, length, heads, width // heads) for i in range(3)
        )
        query, key = (rotate(t, *kind.angles) for t in (query, key))
        see = partial(_attend, Sight(segments, segments))
        if kind.is_local is None:
            mixed = see(kind.window, query, key, value)
        else:
            both = [partial(see, None), partial(see, c.window)]
            mixed = jax.lax.switch(kind.is_local, both, query, key, value)
        output = nn.Dense(width, c.attention_bias, name="output", dot_general=dot_general)
        return output(mixed.reshape(batch, length, width))


class FeedForward(nn.Module):
    """GeGLU: `output(gelu(first(x)) · second(x))`, of which one layer makes both."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        c = self.config
        made = _several(2, c.intermediate_size, c.mlp_bias, "input")(x)
        y = ACTIVATIONS[c.hidden_activation](made[:, :, 0]) * made[:, :, 1]
        return nn.Dense(c.hidden_size, c.mlp_bias, name="output", dot_general=dot_general)(y)


class ModernBertLayer(nn.Module):
    """Attention, then a feed-forward network, each after a norm and with a residual connection."""

    config: ModernBertConfig
    is_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, kind: Kind) -> jax.Array:
        """Map `[batch, length, width]` to the same shape and dtype."""
        c = self.config
        # the embeddings are normed already
        normed = x if self.is_first else _norm(c, "attention_norm")(x)
        x = x + Attention(c, name="attention")(normed, segments, kind)
        return x + FeedForward(c, name="mlp")(_norm(c, "mlp_norm")(x))


class Embeddings(nn.Module):
    """Normalized word embeddings."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map integers `[batch, length]` to `[batch, length, width]`."""
        c = self.config
        return _norm(c, "norm")(Embedding(c.vocab_size, c.hidden_size, name="word")(ids))


class ModernBert(nn.Module):
    """A ModernBERT encoder without a head."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array) -> jax.Array:
        """Encode token ids.

        Args:
          ids: integers `[batch, length]`.
          segments: integers or booleans `[batch, length]`, 0 at padding. Several texts can share a
            row, packed one after another and numbered 1, 2, ...: each sees only itself, and its
            positions start from 0.

        Returns:
          Hidden states `[batch, length, width]` in the parameters' dtype, meaningless at padding.

        Raises:
          ValueError: the rows are longer than `max_position_embeddings`.
        """
        c = self.config
        if ids.shape[1] > c.longest:
            raise ValueError(
                f"length {ids.shape[1]} is above max_position_embeddings "
                f"{c.max_position_embeddings}"
            )
        places, size = positions_of(segments), c.hidden_size // c.num_attention_heads
        ropes = {GLOBAL: c.global_rope, LOCAL: c.local_rope}
        angles = {kind: rope.angles(places, size) for kind, rope in ropes.items()}
        windows = {GLOBAL: None, LOCAL: c.window}
        kinds = {kind: Kind(angles[kind], None, windows[kind]) for kind in ropes}
        layer = rematerialized(ModernBertLayer, c.remat, scan=c.scan)
        first, *others = c.layer_types
        x = Embeddings(c, name="embeddings")(ids)
        x = layer(c, True, name="layer_0")(x, segments, kinds[first])
        if c.scan and others:
            stack, kind = layer(c, name="layers"), _stacked(others, kinds)
            shared, each = ((segments, kind), ()) if len({*others}) == 1 else ((segments,), (kind,))
            x = layers.run(stack, len(others), x, *shared, each=each)
        else:
            for i, name in enumerate(others, 1):
                x = layer(c, name=f"layer_{i}")(x, segments, kinds[name])
        return _norm(c, "norm")(x)


def _stacked(names: Sequence[str], kinds: Mapping[str, Kind]) -> Kind:
    """Return the kind of all these layers, or an array of their kinds."""
    if len({*names}) == 1:
        return kinds[names[0]]
    numbers = jnp.asarray([name == LOCAL for name in names], jnp.int32)
    angles = jax.tree.map(
        lambda one, other: jnp.stack([one, other])[numbers],
        kinds[GLOBAL].angles,
        kinds[LOCAL].angles,
    )
    return Kind(angles, numbers)
