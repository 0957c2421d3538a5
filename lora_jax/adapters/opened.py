"""Adapted nodes as plain dictionaries of their arrays, for the state of an optimizer.

`nnx.Optimizer` takes the state apart down to each array and rebuilds only dictionaries; and
`flax.serialization` knows only these. So optax sees `{"w": ..., "a": ..., "b": ..., "scale": ...}`
where the parameters have a `LoraWeight`.
"""

import dataclasses
from typing import Any

import jax

from lora_jax.core.boxes import is_variable, opened
from lora_jax.core.weights import Adapted, is_adapted


def open_nodes(tree: Any) -> Any:
    """Return `tree` with a dictionary for each adapted node, and all else the same objects.

    Each array of a node in an `nnx.Variable` gets its own variable of the same class.

    >>> import jax.numpy as jnp
    >>> from lora_jax import TrainedLeaf
    >>> sorted(open_nodes({"bias": TrainedLeaf(jnp.zeros(3), jnp.ones(3), jnp.ones(()))})["bias"])
    ['scale', 'value', 'w']
    """

    def one(unit: Any) -> Any:
        value, put = opened(unit)
        if not is_adapted(value):
            return unit
        keep = put if is_variable(unit) else lambda x: x
        return {name: keep(x) for name, x in _fields(value).items()}

    return jax.tree.map(one, tree, is_leaf=_is_unit)


def close_nodes(tree: Any, like: Any) -> Any:
    """Return what `open_nodes` made of a tree such as `like` with the nodes of that tree again."""

    def one(unit: Any, part: Any) -> Any:
        value, put = opened(unit)
        if not is_adapted(value):
            return part
        fields = {name: opened(x)[0] for name, x in part.items()}
        return put(dataclasses.replace(value, **fields))

    return jax.tree.map(one, like, tree, is_leaf=_is_unit)


def _is_unit(x: Any) -> bool:
    return is_adapted(opened(x)[0])


def _fields(node: Adapted) -> dict[str, Any]:
    """Return the leaves of a node by name."""
    named = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    static = {f.name for f in dataclasses.fields(node) if "static" in f.metadata}
    return {name: x for name, x in named.items() if name not in static}
