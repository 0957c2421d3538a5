"""Which leaves an optimizer may touch: optax masks, labels, and `freeze`."""

import dataclasses
from typing import Any

import jax
import optax

from lora_jax.errors import StructureError
from lora_jax.weights import is_adapted

TRAIN, FREEZE = "train", "freeze"
TRAINED_FIELDS = ("a", "b", "magnitude", "value")


def labels(params: Any) -> Any:
    """A tree of the same structure with "train" at A, B and leaves trained whole, else "freeze".

    For `optax.multi_transform`. Works on a joined tree and on an overlay.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> node = labels(params)["kernel"]
    >>> node.w, node.a, node.b, node.scale
    ('freeze', 'train', 'train', 'freeze')
    """

    def one(node: Any) -> Any:
        if not is_adapted(node):
            return FREEZE
        return dataclasses.replace(
            node,
            **{
                field.name: jax.tree.map(
                    lambda _, name=field.name: _label(name), getattr(node, field.name)
                )
                for field in dataclasses.fields(node)
                if "static" not in field.metadata
            },
        )

    return jax.tree.map(one, params, is_leaf=is_adapted)


def _label(field: str) -> str:
    return TRAIN if field in TRAINED_FIELDS else FREEZE


def mask(params: Any) -> Any:
    """A tree of the same structure with True at A, B and leaves trained whole, else False.

    For `optax.masked`, which passes what it masks out through untouched: used alone it would add
    raw gradients to the frozen leaves. `freeze` does not.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> mask(params)["kernel"].a, mask(params)["kernel"].w
    (True, False)
    """
    return jax.tree.map(lambda label: label == TRAIN, labels(params))


def freeze(tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """`tx` on A, B and the leaves trained whole; every other leaf gets a zero update.

    Frozen leaves have no optimizer state, and are not counted by what `tx` measures (a clipped
    global norm, say). Works on the joined tree, and on the overlay of the split form too, in which
    `scale` is a frozen leaf.

    Args:
      tx: any optax gradient transformation.
      params: the tree whose structure the gradients will have.

    Raises:
      StructureError: nothing in `params` would be trained.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> tx = freeze(optax.adam(1e-3), params)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(abs(updates["kernel"].w).max()), float(abs(updates["kernel"].a).max()) > 0
    (0.0, True)
    """
    tree = labels(params)
    if TRAIN not in jax.tree.leaves(tree):
        raise StructureError("freeze: the tree holds no adapters, so nothing would be trained")
    # As a function of it: a tree that can itself be called (an Equinox module) optax would call.
    return optax.multi_transform({TRAIN: tx, FREEZE: optax.set_to_zero()}, lambda _: tree)
