"""The adapted nodes of a parameter tree."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.errors import StructureError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import Adapted, is_adapted


def map_adapted(fn: Callable[[str, Adapted], Any], params: Any) -> Any:
    """Return `params` with `fn(path, node)` for every adapted node, all else the same objects."""
    nodes, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    return jax.tree_util.tree_unflatten(
        treedef, [fn(path, n) if is_adapted(n) else n for path, n in nodes.items()]
    )


def adapted_nodes(params: Any) -> dict[str, Adapted]:
    """Return the adapted nodes of a tree (`LoraWeight`, `TrainedLeaf`, `TrainedRows`) by path."""
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    return {path: node for path, node in nodes.items() if is_adapted(node)}


def require_adapted(caller: str, params: Any) -> dict[str, Adapted]:
    """Return the adapted nodes of a tree by path, or raise if there are none.

    Raises:
      StructureError: `params` contains no adapters.
    """
    nodes = adapted_nodes(params)
    if not nodes:
        raise StructureError(
            f"{caller}: the tree contains no adapters. Create them with init(key, params, config), "
            "or load an adapter file and join it with its base"
        )
    return nodes
