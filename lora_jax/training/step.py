"""One training step: add up the gradients of several micro-batches, then update once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import lora_jax as lora
from lora_jax.training.cross_entropy import JaxBatch, LossSums
from lora_jax.training.distributed.mesh import mesh_of, row_sharding
from lora_jax.training.distributed.placing import complete

# (params, batch) -> the sums of a batch, such as `loss.language_sums` returns
Loss = Callable[[Any, JaxBatch], LossSums]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a step changes."""

    adapters: Any  # as `lora_jax.split` returns them
    optimizer: Any  # the optax state
    step: jax.Array  # int32 scalar: steps done


def init_state(adapters: Any, tx: optax.GradientTransformation) -> State:
    """Return the state before the first step. It owns its arrays, since steps donate them.

    If adapters lie on a mesh, so does all of the state.
    """
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), adapters)
    return complete(State(own, tx.init(own), jnp.zeros((), jnp.int32)), mesh_of(adapters))


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    seed: int = 0,
    like: State | None = None,
    merge_aware: bool = False,
) -> Callable[..., tuple[State, LossSums]]:
    """Return a compiled training step, `(state, base, batch, done=None) -> (state, measured)`.

    The loss is that of the whole batch, Σ losses / Σ weights, however many micro-batches its rows
    are split into. The mean of their means would differ where prompts or padding take unequal
    shares of them.

    Args:
      loss: sums over a batch, for the plain model (`lora_jax.lora` is applied here).
      tx: the optimizer of the adapters.
      accumulate: number of micro-batches per batch; memory is that of one micro-batch.
      seed: random seed for dropout, if the adapters have any; each step draws its own.
      like: the first state. If it lies on a mesh, the state stays where it is there, so a step
        compiles once; and the rows of each micro-batch are divided over the mesh.
      merge_aware: as in `lora_jax.lora`.

    Returns:
      A function of the state, whose arrays are donated; the base, which gets no gradient; and a
      batch `[rows, ...]` whose rows `accumulate` divides. It measures float32 scalars: "loss", the
      mean; "weight"; "gradient_norm" before clipping; and the other sums of `loss`. If loss or
      norm is not finite, the state is returned unchanged. So it is where `done`, the steps that the
      caller dispatched before, is not the state's own number: no step follows one that failed,
      though the caller may read only later that it did.
    """
    mesh = mesh_of(like)
    where = None if mesh is None else (jax.tree.map(lambda x: x.sharding, like), None)
    differentiate = make_gradients(loss, accumulate, merge_aware, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=where)
    def step(state: State, base: Any, batch: JaxBatch, done: Any = None) -> tuple[State, LossSums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean, measured = differentiate(state.adapters, base, batch, key)
        updates, optimizer = tx.update(mean, state.optimizer, state.adapters)
        adapters = lora.apply_updates(state.adapters, updates)
        # The state is donated, so a caller could not go back to it: choose here.
        finite = jnp.isfinite(measured["loss"]) & jnp.isfinite(measured["gradient_norm"])
        if done is not None:
            finite &= state.step == done
        adapters, optimizer = jax.tree.map(
            partial(jnp.where, finite), (adapters, optimizer), (state.adapters, state.optimizer)
        )
        return State(adapters, optimizer, state.step + finite.astype(jnp.int32)), measured

    return step


def make_gradients(
    loss: Loss, accumulate: int = 1, merge_aware: bool = False, mesh: Mesh | None = None
) -> Callable[[Any, Any, JaxBatch, jax.Array], tuple[Any, LossSums]]:
    """Return `(adapters, base, batch, key) -> (gradients, measured)`, as a step needs them.

    Args:
      loss: as for `make_step`.
      accumulate: likewise.
      merge_aware: likewise.
      mesh: over which the rows of each micro-batch are divided.

    Returns:
      A function that is not compiled, of a key for dropout. The gradients are those of the mean
      loss; what it measures is as for `make_step`.
    """
    adapted = lora.lora(loss, merge_aware=merge_aware)

    def of_part(adapters: Any, base: Any, batch: JaxBatch, key: jax.Array) -> Any:
        def total(adapters: Any) -> tuple[jax.Array, LossSums]:
            params = lora.with_dropout(lora.join(base, adapters), key)
            sums = adapted(params, batch)
            return sums["loss"], sums

        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(adapters)
        return jax.tree.map(_widen, (gradients, sums))

    def differentiate(
        adapters: Any, base: Any, batch: JaxBatch, key: jax.Array
    ) -> tuple[Any, LossSums]:
        one = lambda part, key: of_part(adapters, base, part, key)
        gradients, sums = _sum_over_parts(one, batch, jax.random.split(key, accumulate), mesh)
        mean = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1e-9), gradients)
        norm = _gradient_norm(mean, adapters)
        measured = {**sums, "loss": sums["loss"] / sums["weight"], "gradient_norm": norm}
        return jax.tree.map(lambda g, x: g.astype(x.dtype), mean, adapters), measured

    return differentiate


def _sum_over_parts(
    one: Callable[[JaxBatch, jax.Array], Any],
    batch: JaxBatch,
    keys: jax.Array,
    mesh: Mesh | None,
) -> Any:
    """Sum `one` over the parts of a batch, one part per key, with one part in memory at a time."""
    count = len(keys)
    if count == 1:
        return one(batch, keys[0])
    parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), dict(batch))
    if mesh is not None:
        parts = jax.lax.with_sharding_constraint(parts, row_sharding(mesh, axis=1))
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first, keys[0]))
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None)
    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _widen(x: jax.Array) -> jax.Array:
    """Widen an array to at least float32, for sums over many parts."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _gradient_norm(gradients: Any, adapters: Any) -> jax.Array:
    """Compute the global norm over what trains."""
    trains = jax.tree.leaves(lora.mask(adapters))
    return optax.tree.norm(
        [g for g, t in zip(jax.tree.leaves(gradients), trains, strict=True) if t]
    )


def make_evaluation(
    loss: Loss, merge_aware: bool = False, stacked: bool = False
) -> Callable[[Any, Any, JaxBatch], LossSums]:
    """Return a compiled `(adapters, base, batch) -> LossSums`, without dropout.

    With `stacked` it takes a stack of adapters, and the sums are those of each slot.
    """
    adapted = lora.lora(loss, merge_aware=merge_aware)
    one = lambda adapters, base, batch: adapted(lora.join(base, adapters), batch)
    return jax.jit(jax.vmap(one, (0, None, None)) if stacked else one)
