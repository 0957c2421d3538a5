"""Walks over the adapted nodes of a parameter tree."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import Adapted, is_adapted


def map_adapted(fn: Callable[[str, Adapted], Any], params: Any) -> Any:
    """`params` with `fn(path, node)` in place of every adapted node, all else the same objects."""
    nodes, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    return jax.tree_util.tree_unflatten(
        treedef, [fn(path, n) if is_adapted(n) else n for path, n in nodes.items()]
    )


def adapted_nodes(params: Any) -> dict[str, Adapted]:
    """The `LoraWeight`s and `TrainedLeaf`s of a tree by path."""
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    return {path: node for path, node in nodes.items() if is_adapted(node)}
