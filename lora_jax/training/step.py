"""One training step: gradients of several micro-batches, added up, then one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax.training.loss import Batch, Sums

# (params, batch) -> the sums of a batch, as `loss.language_sums` makes it
Loss = Callable[[Any, Batch], Sums]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes."""

    adapters: Any  # an overlay, as `lora_jax.split` gives it
    optimizer: Any  # the optax state
    step: jax.Array  # int32 scalar: steps done


def init_state(adapters: Any, tx: optax.GradientTransformation) -> State:
    """Return the state before the first step. It owns its arrays, since steps donate them."""
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), adapters)
    return State(own, tx.init(own), jnp.zeros((), jnp.int32))


def make_step(
    loss: Loss, tx: optax.GradientTransformation, accumulate: int = 1, seed: int = 0
) -> Callable[[State, Any, Batch], tuple[State, Sums]]:
    """A compiled training step, `(state, base, batch) -> (state, measured)`.

    The loss is that of the whole batch, Σ losses / Σ weights, whatever number of micro-batches its
    rows are split into: not the mean of their means, which differs where prompts or padding take
    unequal shares of them.

    Args:
      loss: the sums of a batch, of the model as it was before `lora_jax.lora`.
      tx: the optimizer of the adapters.
      accumulate: micro-batches that a batch's rows are split into; memory is that of one.
      seed: of the dropout in the branches, if the adapters have any; each step has its own.

    Returns:
      A function of the state, whose arrays are donated, the base, which gets no gradient, and a
      batch `[rows, ...]`, of which `accumulate` divides the rows. What it measured are float32
      scalars: "loss", the mean; "weight"; "gradient_norm" before clipping; and the other sums of
      `loss`. Where loss or norm is not finite the state comes back as it was.
    """
    adapted = lora.lora(loss)

    def of_micro_batch(adapters: Any, base: Any, batch: Batch, key: jax.Array) -> Any:
        def total(adapters: Any) -> tuple[jax.Array, Sums]:
            params = lora.with_dropout(lora.join(base, adapters), key)
            sums = adapted(params, batch)
            return sums["loss"], sums

        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(adapters)
        return jax.tree.map(_widened, (gradients, sums))

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, base: Any, batch: Batch) -> tuple[State, Sums]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), accumulate)
        one = lambda part, key: of_micro_batch(state.adapters, base, part, key)
        gradients, sums = _added_up(one, batch, keys)
        mean = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1e-9), gradients)
        norm = _norm(mean, state.adapters)
        measured = {**sums, "loss": sums["loss"] / sums["weight"], "gradient_norm": norm}
        mean = jax.tree.map(lambda g, x: g.astype(x.dtype), mean, state.adapters)
        updates, optimizer = tx.update(mean, state.optimizer, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        # The state's memory is given away, so what is good must be chosen here.
        finite = jnp.isfinite(measured["loss"]) & jnp.isfinite(norm)
        adapters, optimizer = jax.tree.map(
            partial(jnp.where, finite), (adapters, optimizer), (state.adapters, state.optimizer)
        )
        return State(adapters, optimizer, state.step + finite.astype(jnp.int32)), measured

    return step


def _added_up(one: Callable[[Batch, jax.Array], Any], batch: Batch, keys: jax.Array) -> Any:
    """The sum of `one` over a batch's parts, one for each key, holding one at a time."""
    count = len(keys)
    if count == 1:
        return one(batch, keys[0])
    parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), dict(batch))
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first, keys[0]))
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None)
    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _widened(x: jax.Array) -> jax.Array:
    """Sums of many parts are kept in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(gradients: Any, adapters: Any) -> jax.Array:
    """The global norm over what trains."""
    trains = jax.tree.leaves(lora.mask(adapters))
    return optax.tree.norm(
        [g for g, t in zip(jax.tree.leaves(gradients), trains, strict=True) if t]
    )


def make_evaluation(loss: Loss) -> Callable[[Any, Any, Batch], Sums]:
    """A compiled `(adapters, base, batch) -> Sums`, without dropout."""
    adapted = lora.lora(loss)
    return jax.jit(lambda adapters, base, batch: adapted(lora.join(base, adapters), batch))
