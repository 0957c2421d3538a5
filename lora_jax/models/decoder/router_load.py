"""How evenly routers share out tokens, and the loss that asks them to."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.errors import ConfigError

#: The collection in which each layer with experts leaves its load, where a call asks for it.
ROUTER = "router"


def router_load(logits: jax.Array, chosen: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Sum up what the router of a layer did with the tokens that are not padding.

    Args:
      logits: the router's, `[tokens, experts]`.
      chosen: the experts' numbers, `[tokens, chosen]`.
      segments: integers of `tokens` numbers, 0 at padding; None where there is none.

    Returns:
      `[3, experts]`: how many tokens chose each expert, the sum of their probabilities, and in each
      place the number of tokens.
    """
    experts = logits.shape[-1]
    seen = jnp.ones(len(logits), logits.dtype)
    if segments is not None:
        seen = (segments.reshape(-1) > 0).astype(logits.dtype)
    hits = jax.nn.one_hot(chosen, experts, dtype=logits.dtype).sum(1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    sums = [(x * seen[:, None]).sum(0) for x in (hits, probabilities)]
    return jnp.stack([*sums, jnp.full(experts, seen.sum())])


def hidden_with_router_loss(
    module: nn.Module,
) -> Callable[[Any, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]:
    """Return `(params, ids, segments) -> (hidden states, loss)` of a decoder with experts.

    The loss is that of Switch Transformers (https://arxiv.org/abs/2101.03961, equations 4 to 6) as
    transformers computes it, over the tokens of all layers together: experts · Σ share of the
    choices · mean probability. It is the number of chosen experts where all are used alike.

    Args:
      module: a `Decoder`.

    Raises:
      ConfigError: its layers have no experts.
    """
    if getattr(module.config, "experts", None) is None:
        raise ConfigError("the model has no experts, so no router whose loss could be added")

    def hidden(params: Any, ids: jax.Array, segments: jax.Array | None = None) -> Any:
        states, left = module.apply(
            {"params": params}, ids, segments, method="hidden", mutable=[ROUTER]
        )
        return states, balancing_loss(left[ROUTER])

    return hidden


def balancing_loss(loads: Any) -> jax.Array:
    """Compute the loss of the loads of all layers, in the collection `ROUTER`: a scalar."""
    hits, probabilities, tokens = sum(
        x.reshape(-1, *x.shape[-2:]).sum(0) for x in jax.tree.leaves(loads)
    )
    count = jnp.maximum(tokens, 1)
    return len(hits) * (hits / count * (probabilities / count)).sum()
