"""Stacks of adapters, and adapters that were selected from one, for verbs of single adapters."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.stack import stack, unstack
from lora_jax.core.tree import adapted_nodes


def is_stack(tree: Any) -> bool:
    """Return whether a tree is a stack of adapters."""
    return any(node.slots is not None for node in adapted_nodes(tree).values())


def map_slots(fn: Callable[[int, Any], Any], tree: Any) -> Any:
    """Return the stack of `fn(slot, overlay)` for each adapter of a stack, joined if it was.

    Raises:
      ConfigError: the stack is traced, so that its ranks are not known.
    """
    base, overlay = _split(tree)
    made = stack([fn(slot, one) for slot, one in enumerate(unstack(overlay))])
    return made if base is None else join(base, made)


def out_of_stack(tree: Any) -> Any:
    """Return an adapter that `select` took out of a stack, without padding; others as they are.

    Raises:
      ConfigError: it is traced, so that its ranks are not known.
    """
    if all(getattr(node, "slot", None) is None for node in adapted_nodes(tree).values()):
        return tree
    base, overlay = _split(tree)
    (alone,) = unstack(jax.tree.map(lambda x: x[None], overlay))
    return alone if base is None else join(base, alone)


def _split(tree: Any) -> tuple[Any, Any]:
    """Return the base, or None, and the overlay."""
    joined = any(node.w is not None for node in adapted_nodes(tree).values())
    return split(tree) if joined else (None, tree)
