"""The adapted nodes of a parameter tree, and models that hold them in their own way."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from lora_jax.core.errors import StructureError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import Adapted, is_adapted


class Wrapped:
    """A parent of a framework's adapted models, for which `merge`, `split` and `save` work too."""

    def params(self) -> Any:
        """Return the joined tree: the model's parameters with their adapters."""
        raise NotImplementedError

    def merge(self, **options: Any) -> Any:
        """Return the model without adapters, with `W + scale · A · B` as its parameters."""
        raise NotImplementedError


def unwrapped(params: Any) -> Any:
    """Return the joined tree of a framework's adapted model, and any other tree as it is."""
    return params.params() if isinstance(params, Wrapped) else params


def map_adapted(fn: Callable[[str, Adapted], Any], params: Any) -> Any:
    """Return `params` with `fn(path, node)` for every adapted node, all else the same objects."""
    nodes, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    _require_tree(params, nodes.values())
    return jax.tree_util.tree_unflatten(
        treedef, [fn(path, n) if is_adapted(n) else n for path, n in nodes.items()]
    )


def adapted_nodes(params: Any) -> dict[str, Adapted]:
    """Return the adapted nodes of a tree (`LoraWeight`, `TrainedLeaf`, `TrainedRows`) by path."""
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    _require_tree(params, nodes.values())
    return {path: node for path, node in nodes.items() if is_adapted(node)}


def _require_tree(params: Any, nodes: Iterable[Any]) -> None:
    """Raise if a model holds its adapters as variables: a function of trees would miss them."""
    if isinstance(params, Wrapped) and not any(map(is_adapted, nodes)):
        raise StructureError(
            f"{type(params).__name__} is a model, and this function takes a tree of parameters: "
            "pass model.params()"
        )


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
