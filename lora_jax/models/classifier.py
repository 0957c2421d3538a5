"""A sequence classifier: a model's hidden states, one vector per text, and a linear head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.encoder.bert import mean_pool

Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Classifier:
    """A linear head on one vector per text, as a function of packed texts.

    Its parameters are a mapping: the model's own as "encoder"; "head", with a `kernel`
    `[width, classes]` and perhaps a `bias`; and, for classifiers on encoders, "pooler", a layer
    between the two: a `kernel`, perhaps a `bias`, and where a norm follows its `scale` and perhaps
    its `shift`.

    Attributes:
      hidden: `(params, ids, segments) -> hidden states` `[rows, length, width]`.
      slots: maximum number of texts per row.
      pooling: what represents a text: the mean of its tokens, the first (as in transformers'
        classifiers on encoders such as BERT), or the last (on decoders such as Llama).
      activation: of the pooler, a name in `ACTIVATIONS`.
      epsilon: of the pooler's norm.
    """

    hidden: Callable[[Any, Any, Any], jax.Array]
    slots: int
    pooling: Pooling = "mean"
    activation: str = "tanh"
    epsilon: float = 1e-5

    def embed(self, params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
        """Return one vector per text, the head's input: float32 `[rows, slots, width]`."""
        states = self.hidden(params["encoder"], ids, segments).astype(jnp.float32)
        pooled = pool(states, segments, self.slots, self.pooling)
        if "pooler" not in params:
            return pooled
        made = ACTIVATIONS[self.activation](_linear(params["pooler"], pooled))
        return _norm(params["pooler"], made, self.epsilon) if "scale" in params["pooler"] else made

    def __call__(self, params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
        """Return each text's logits: float32 `[rows, slots, classes]`."""
        return _linear(params["head"], self.embed(params, ids, segments))


def pool(hidden: jax.Array, segments: jax.Array, count: int, how: Pooling) -> jax.Array:
    """Return one vector per segment: the mean of its tokens, its first or its last.

    Args:
      hidden: `[batch, length, width]`.
      segments: integers `[batch, length]`, 0 at padding.
      count: maximum number of segments per row, static.
      how: which tokens.

    Returns:
      `[batch, count, width]`; entry `[:, i]` belongs to segment `i + 1` and is zero where a row has
      no such segment.

    >>> hidden = jnp.array([[[1.0], [2.0], [4.0], [8.0]]])
    >>> [pool(hidden, jnp.array([[1, 1, 2, 0]]), 2, how).tolist() for how in ("first", "last")]
    [[[[1.0], [4.0]]], [[[2.0], [4.0]]]]
    """
    if how == "mean":
        return mean_pool(hidden, segments, count)
    length = segments.shape[1]
    place = jnp.arange(length)[None, None]
    member = segments[:, None, :] == jnp.arange(1, count + 1)[None, :, None]
    if how == "first":
        chosen = jnp.where(member, place, length).min(-1)
    else:
        chosen = jnp.where(member, place, -1).max(-1)
    picks = (chosen[..., None] == place).astype(hidden.dtype)
    return jnp.einsum("bsl,blw->bsw", picks, hidden)


def _linear(params: Any, x: jax.Array) -> jax.Array:
    y = x @ params["kernel"].astype(x.dtype)
    return y + params["bias"].astype(x.dtype)[None, None] if "bias" in params else y


def _norm(params: Any, x: jax.Array, epsilon: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    y = y * params["scale"].astype(x.dtype)[None, None]
    return y + params["shift"].astype(x.dtype)[None, None] if "shift" in params else y
