"""A classifier on top of a pretrained model: mean pooling and a linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.cli.base_model import Model
from lora_jax.models.bert import mean_pool


def with_head(
    model: Model, classes: int, slots: int, seed: int
) -> tuple[Callable[[Any, Any, Any], Any], dict[str, Any]]:
    """A function of packed texts, and its parameters.

    Args:
      model: gives hidden states.
      classes: how many logits a text gets.
      slots: texts a row holds at most.
      seed: of the head's start, N(0, 1/width).

    Returns:
      `(params, ids, segments) -> logits` `[rows, slots, classes]`, float32; and a tree with the
      model's parameters as "encoder" and a float32 "head".
    """

    def apply(params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
        hidden = model.hidden(params["encoder"], ids, segments)
        pooled = mean_pool(hidden.astype(jnp.float32), segments, slots)
        return pooled @ params["head"]["kernel"] + params["head"]["bias"][None, None]

    kernel = jax.random.normal(jax.random.key(seed), (model.width, classes)) / model.width**0.5
    return apply, {"encoder": model.params, "head": {"kernel": kernel, "bias": jnp.zeros(classes)}}
