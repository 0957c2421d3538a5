"""Log-probabilities of pairs of completions, and sums of a preference loss over a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.training.chunked_loss import (
    Finish,
    Hidden,
    TokenLosses,
    token_losses_of_frozen_head,
    token_losses_of_trained_head,
)
from lora_jax.training.cross_entropy import JaxBatch, LossSums, cross_entropy, sum_by_text
from lora_jax.training.preference.losses import LogProbs, PairLosses

PairLogProbs = Callable[[Any, JaxBatch], LogProbs]  # (params, batch) -> [rows, slots]
#: (policy, reference) -> losses; the reference is None for a loss that needs none
PairLoss = Callable[[LogProbs, LogProbs | None], PairLosses]

REFERENCE = "reference"  # the name in a batch: float32 [rows, 2, slots]
SIDES = 2  # chosen, rejected


def log_probs(apply: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> PairLogProbs:
    """Return the log-probabilities of pairs, as a function of parameters and a batch.

    Args:
      apply: `(params, ids, segments) -> logits` `[rows, length, vocabulary]`.

    Returns:
      `(params, batch) -> LogProbs` `[rows, slots]`, float32, for batches of `pack_pairs`. A slot
      without a pair has log-probabilities of -1. With adapters use `lora_jax.lora` of it; the same
      function of `lora_jax.disable(params)` gives those of the base.
    """

    def losses(params: Any, batch: JaxBatch) -> jax.Array:
        ids = batch["ids"]
        return cross_entropy(apply(params, ids[:, :-1], batch["segments"][:, :-1]), ids[:, 1:])

    return _of_token_losses(losses)


def log_probs_of_frozen_head(
    hidden: Hidden,
    head: Callable[[Any], jax.Array],
    chunk: int | None = None,
    finish: Finish = lambda products: products,
) -> PairLogProbs:
    """Return `log_probs` for a model whose head is frozen, without the logits of all tokens.

    The arguments are those of `token_losses_of_frozen_head`.
    """
    return _of_token_losses(token_losses_of_frozen_head(hidden, head, chunk, finish))


def log_probs_of_trained_head(
    hidden: Hidden, logits: Callable[[Any, jax.Array], jax.Array], chunk: int | None = None
) -> PairLogProbs:
    """Return `log_probs` for a model whose head trains, without the logits of all tokens.

    The arguments are those of `token_losses_of_trained_head`.
    """
    return _of_token_losses(token_losses_of_trained_head(hidden, logits, chunk))


def preference_sums(log_probs: PairLogProbs, loss: PairLoss) -> Callable[[Any, JaxBatch], LossSums]:
    """Return a preference loss as sums over a batch, for `make_step` and `train`.

    Args:
      log_probs: from one of the functions above.
      loss: such as `lambda policy, reference: dpo(policy, reference, beta=0.1)`. The reference
        comes from the batch, where `with_reference` has put it.

    Returns:
      `(params, batch) -> LossSums`: "loss"; "weight", the number of pairs; "right", how many of
      them have the higher reward on the chosen side; "margin", "chosen_reward" and
      "rejected_reward", sums over the pairs; "tokens", those of all completions.
    """

    def sums(params: Any, batch: JaxBatch) -> LossSums:
        policy, there = log_probs(params, batch), batch["pairs"]
        reference = None
        if REFERENCE in batch:
            chosen, rejected = jnp.moveaxis(batch[REFERENCE], 1, 0)
            reference = policy._replace(chosen=chosen, rejected=rejected)
        found = loss(policy, reference)
        margins = found.chosen_rewards - found.rejected_rewards
        total = lambda x: jnp.where(there > 0, x * there, 0).sum()
        return {
            "loss": total(found.losses),
            "weight": there.sum(),
            "right": total((margins > 0).astype(margins.dtype)),
            "margin": total(margins),
            "chosen_reward": total(found.chosen_rewards),
            "rejected_reward": total(found.rejected_rewards),
            "tokens": batch["weights"].sum(),
        }

    return sums


def _of_token_losses(losses: TokenLosses) -> PairLogProbs:
    def of(params: Any, batch: JaxBatch) -> LogProbs:
        sides = {name: batch[name] for name in ("ids", "segments", "weights")}
        rows, _, length = sides["ids"].shape
        flat = {name: x.reshape(rows * SIDES, length) for name, x in sides.items()}
        found = -losses(params, flat).reshape(rows, SIDES, length - 1)
        return _sum_pairs(found, sides["segments"], sides["weights"], batch["pairs"])

    return of


def _sum_pairs(
    found: jax.Array, segments: jax.Array, weights: jax.Array, pairs: jax.Array
) -> LogProbs:
    """Sum log-probabilities `[rows, 2, length]` over the tokens of each pair's completions."""
    before, here = segments[..., :-1], segments[..., 1:]
    total = lambda counted, x: sum_by_text(x, here, counted, pairs.shape[-1])
    completion, follows = weights[..., 1:] > 0, before == here
    ones = jnp.ones_like(found)
    sums, counts = total(completion, found), jnp.maximum(total(completion, ones), 1)
    text = total(follows, found)[:, 0] / jnp.maximum(total(follows, ones)[:, 0], 1)
    # losses have no value and no gradient where a completion is certain, as an empty one is
    there = pairs > 0
    chosen, rejected, text = (jnp.where(there, x, -1) for x in (sums[:, 0], sums[:, 1], text))
    return LogProbs(chosen, rejected, counts[:, 0], counts[:, 1], text)
