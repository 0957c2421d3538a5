"""Stacks of adapters, and adapters that were selected from one, for verbs of single adapters."""

from collections.abc import Callable
from typing import Any

from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.stack import stack, unstack
from lora_jax.core.errors import ConfigError
from lora_jax.core.slots import is_known, unpadded
from lora_jax.core.tree import adapted_nodes, map_adapted


def is_stack(tree: Any) -> bool:
    """Return whether a tree is a stack of adapters."""
    return any(node.slots is not None for node in adapted_nodes(tree).values())


def map_slots(fn: Callable[[int, Any], Any], tree: Any) -> Any:
    """Return the stack of `fn(slot, overlay)` for each adapter of a stack, joined if it was.

    Raises:
      ConfigError: the stack is traced, so that its ranks are not known.
    """
    joined = any(node.w is not None for node in adapted_nodes(tree).values())
    base, overlay = split(tree) if joined else (None, tree)
    made = stack([fn(slot, one) for slot, one in enumerate(unstack(overlay))])
    return join(base, made) if joined else made


def out_of_stack(caller: str, tree: Any) -> Any:
    """Return an adapter that `select` took out of a stack, without padding; others as they are.

    Raises:
      ConfigError: it is traced, so that its ranks are not known.
    """
    for path, node in adapted_nodes(tree).items():
        if node.slot is not None and not is_known(node):
            raise ConfigError(
                f"{caller}: {path} is from a stack and has no values here, and so its rank is not "
                "known; call it outside jit"
            )

    def one(_: str, node: Any) -> Any:
        own = unpadded(node)
        return node.w if own is None else own

    return map_adapted(one, tree)
