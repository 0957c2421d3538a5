"""A trained leaf, or trained rows, from those of several adapters: their changes of the base."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.algebra.combined_factors import Draw
from lora_jax.adapters.algebra.methods import Recipe, choose_masks, sum_values
from lora_jax.core.dtypes import accumulator, round_to, wider
from lora_jax.core.host_memory import on_device
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.sharding.meshes import gathered
from lora_jax.core.weights import TrainedLeaf, TrainedRows

Trained = TrainedLeaf | TrainedRows


def combine_values(
    nodes: Sequence[Trained], weights: jax.Array, base: Any, recipe: Recipe, draw: Draw
) -> Trained:
    """Return base + Σ wᵢ·(valueᵢ − base), where the sum is the method's, as a node of an overlay.

    Args:
      nodes: of one leaf, all of one kind, without their base.
      weights: `[adapters]`, floating.
      base: the base leaf. None if it cancels out of the sum: then the weights must add up to 1, all
        nodes must be on in the same layers and have the same rows, and the method keeps all values.
      recipe: the method and its options.
      draw: where DARE's masks come from; the leaf counts as one matrix.
    """
    nodes = [jax.tree.map(gathered, node) for node in nodes]
    like = _common_node(nodes)
    wide = accumulator(*(node.value.dtype for node in nodes))
    if base is None:
        before = jnp.zeros_like(like.value, wide)
    else:
        base = gathered(dequantized(on_device(base)))
        before = (like.select(base) if isinstance(like, TrainedRows) else base).astype(wide)
    changes = jnp.stack([_change(node, like, before) for node in nodes])
    values = changes.reshape(len(nodes), 1, -1)  # one matrix
    masks = choose_masks(values, lambda number, shape: draw(number, 0, shape), recipe)
    total = sum_values(values, jnp.asarray(weights, wide), masks, recipe).reshape(before.shape)
    dtype = wider(*(node.value.dtype for node in nodes))
    value = round_to(before + total, dtype).astype(dtype)
    on = jnp.stack([jnp.broadcast_to(x.scale != 0, like.scale.shape) for x in nodes]).any(0)
    return dataclasses.replace(like, value=value, scale=on.astype(like.scale.dtype))


def _common_node(nodes: Sequence[Trained]) -> Any:
    """Return a node with the scale's shape, and all the rows, that the combined one has."""
    if isinstance(nodes[0], TrainedLeaf):
        return max(nodes, key=lambda node: node.scale.ndim)
    rows = tuple(dict.fromkeys(row for node in nodes for row in node.rows))
    return dataclasses.replace(nodes[0], rows=rows)


def _change(node: Trained, like: Any, before: jax.Array) -> jax.Array:
    """Return what a node changes of the values that the combined node takes the place of."""
    value = node.value.astype(before.dtype)
    if isinstance(node, TrainedRows) and node.rows != like.rows:
        axis = node.layout.axes.count("b")
        places = jnp.asarray([like.rows.index(row) for row in node.rows])
        index = (*(slice(None) for _ in range(axis)), places)
        value = before.at[index].set(value)
    off = jnp.expand_dims(node.scale == 0, range(value.ndim - node.scale.ndim))
    return jnp.where(off, 0, value - before)
