"""The auxiliary loss of routers, added to that of a language model with experts."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.training.chunked_loss import Hidden
from lora_jax.training.cross_entropy import JaxBatch, LossSums


def with_router_loss(
    make: Callable[[Hidden], Callable[[Any, JaxBatch], LossSums]],
    hidden: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    weight: float,
) -> Callable[[Any, JaxBatch], LossSums]:
    """Return the sums of a loss with a router's added, so that their mean is mean + weight · its.

    Each micro-batch has its own router's loss; added is their mean, weighted as the losses are.

    Args:
      make: makes a loss of `(params, ids, segments) -> hidden states`, such as
        `language_sums_of_frozen_head` with a head; it calls them once.
      hidden: the same with the router's loss, as `models.hidden_with_router_loss` returns it.
      weight: of the router's loss, `router_aux_loss_coef` in config.json.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        of_routers: list[jax.Array] = []

        def states(params: Any, ids: jax.Array, segments: jax.Array) -> jax.Array:
            found, loss = hidden(params, ids, segments)
            of_routers.append(loss)
            return found

        plain = make(states)(params, batch)
        (loss,) = of_routers
        return {**plain, "loss": plain["loss"] + weight * plain["weight"] * loss}

    return sums
