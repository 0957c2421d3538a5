"""Nested dictionaries of arrays by path, as Orbax restores them."""

from collections.abc import Iterator, Mapping
from typing import Any

#: What stands around the parameters of a model.
_WRAPPERS = ("params", "model_params", "transformer")
#: The same, if nothing is beside it but the rest of a training state.
_OUTER = ("model", "state", "train_state")
_OF_TRAINING = frozenset(
    ("step", "epoch", "opt_state", "optimizer", "tx", "rng", "rngs", "key", "metrics")
    + ("ema", "ema_params", "ema_decay", "batch_stats", "dropout_rng")
)
_VALUE = "value"  # below a variable of Flax NNX, in checkpoints of its states


def unwrap(tree: Any) -> Any:
    """Return the nested dictionary of a model's parameters, without what stands around it.

    >>> unwrap({"params": {"layer": {"w": {"value": 1}}}, "step": 3})
    {'layer': {'w': 1}}
    """
    if hasattr(tree, "to_pure_dict"):  # a state of Flax NNX
        tree = tree.to_pure_dict()
    while (name := wrapper_of(tree)) is not None:
        tree = tree[name]
    leaves = dict(leaves_of(tree))
    if leaves and all(path[-1:] == (_VALUE,) for path in leaves):
        tree = nest({path[:-1]: x for path, x in leaves.items()})
    return tree


def wrapper_of(tree: Any) -> str | None:
    """Return the key under which a tree has all its parameters; None if it is they.

    >>> wrapper_of({"model": {"w": 1}, "optimizer": {"mu": {"w": 2}}})
    'model'
    >>> wrapper_of({"model": {"w": 1}, "head": {"w": 2}})
    """
    if not isinstance(tree, Mapping):
        return None
    inner = [name for name, x in tree.items() if isinstance(x, Mapping)]
    for name in (*_WRAPPERS, *(_OUTER if {*tree} <= {*_OUTER, *_OF_TRAINING} else ())):
        if name in inner:
            return name
    return None


def leaves_of(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of nested mappings with their keys."""
    if not isinstance(tree, Mapping):
        yield at, tree
        return
    for key, value in tree.items():
        yield from leaves_of(value, (*at, key))


def nest(leaves: Mapping[tuple[Any, ...], Any]) -> Any:
    """Return nested dictionaries of leaves by their keys."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        if not path:
            return leaf
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def path_of(keys: tuple[Any, ...]) -> str:
    """Return keys as a path: "layers/0/attn/w"."""
    return "/".join(map(str, keys))
