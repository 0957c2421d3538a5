"""A classifier on top of a pretrained model: mean pooling and a linear head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.bert import mean_pool


def with_head(
    hidden: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    width: int,
    classes: int,
    slots: int,
    seed: int,
) -> tuple[Callable[[Any, Any, Any], Any], dict[str, Any]]:
    """A function of packed texts, and its parameters.

    Args:
      hidden: `(params, ids, segments) -> hidden states` `[rows, length, width]`.
      params: of `hidden`.
      width: the size of a hidden state.
      classes: how many logits a text gets.
      slots: texts a row holds at most.
      seed: of the head's start, N(0, 1/width).

    Returns:
      `(params, ids, segments) -> logits` `[rows, slots, classes]`, float32; and a tree with the
      model's parameters as "encoder" and a float32 "head".
    """

    def apply(params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
        states = hidden(params["encoder"], ids, segments)
        pooled = mean_pool(states.astype(jnp.float32), segments, slots)
        return pooled @ params["head"]["kernel"] + params["head"]["bias"][None, None]

    kernel = jax.random.normal(jax.random.key(seed), (width, classes)) / width**0.5
    return apply, {"encoder": params, "head": {"kernel": kernel, "bias": jnp.zeros(classes)}}
