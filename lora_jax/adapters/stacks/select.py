"""`select` and `set_slot`: take adapters out of a stack and put others in, without recompiling."""

import dataclasses
from typing import Any

import jax

from lora_jax.adapters.stacks.frame import frame_of
from lora_jax.adapters.stacks.stack import slots_of
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.sharding.placement import arrays_of
from lora_jax.core.slots import check_ids, pick_slot, unpadded
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import is_adapted


def select(stack: Any, ids: Any) -> Any:
    """Return the adapters of some slots: one overlay for a number, a stack for an array of them.

    They keep the padding, so that the same compiled function takes any of them; `unstack` cuts it
    off, and so do the functions that save files. An id of -1 is the plain base.

    Args:
      stack: what `stack` returned, also joined with its base.
      ids: an integer, or integers `[n]`, which may be traced.

    Raises:
      ConfigError: `ids` are not integers, have more than one axis, or name no slot.
      StructureError: `stack` contains no stacked adapters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> both = lora_jax.stack([lora_jax.split(params)[1]] * 2)
    >>> select(both, 1)["w"].a.shape, select(both, jnp.array([1, 0, -1]))["w"].a.shape
    ((4, 1), (3, 4, 1))
    """
    ids = check_ids("select", ids, slots_of("select", stack))
    if ids.ndim > 1:
        raise ConfigError(f"select: ids must be an integer or have one axis, got {ids.shape}")
    return map_adapted(lambda _, node: pick_slot(node, ids), stack)


def set_slot(stack: Any, slot: Any, adapters: Any) -> Any:
    """Return the stack with other adapters in one slot; a compiled function takes it as it is.

    Args:
      stack: what `stack` returned, also joined with its base.
      slot: its number, which may be traced.
      adapters: an overlay of the same base, of at most the stack's rank, whose targets the stack
        has; the stack's other targets are zero in this slot. `select(stack, -1)` empties it.

    Raises:
      ConfigError: the stack does not have that slot.
      StructureError: the adapters do not fit the stack; all reasons are listed.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> overlay = lora_jax.split(params)[1]
    >>> both = lora_jax.stack([overlay, lora_jax.disable(overlay)])
    >>> set_slot(both, 1, overlay)["w"].scale
    Array([1., 1.], dtype=float32)
    """
    slot = check_ids("set_slot", slot, slots_of("set_slot", stack), lowest=0)
    if slot.ndim:
        raise ConfigError(f"set_slot: slot must be one number, got shape {slot.shape}")
    new = adapted_nodes(padded("set_slot", stack, adapters))

    def put_in(path: str, node: Any) -> Any:
        one = arrays_of(new[path])
        old = {field: x for field, x in arrays_of(node).items() if field in one}
        return dataclasses.replace(node, **_put(old, one, slot))

    return map_adapted(put_in, stack)


@jax.jit
def _put(stack: dict[str, Any], one: dict[str, Any], slot: Any) -> dict[str, Any]:
    put = lambda x, own: jax.lax.dynamic_update_index_in_dim(x, own.astype(x.dtype), slot, 0)
    return jax.tree.map(put, stack, one)


def padded(caller: str, stack: Any, adapters: Any) -> Any:
    """Return an overlay as it stands in one slot of a stack, which may be abstract.

    Raises:
      StructureError: the adapters do not fit the stack; all reasons are listed.
    """
    frames = {path: frame_of([node]) for path, node in adapted_nodes(stack).items()}
    given, problems = {}, []
    for path, node in flatten_with_paths(adapters, is_leaf=is_adapted)[0].items():
        if not is_adapted(node) or node.w is not None or node.slots is not None:
            problems.append(f"{path}: pass a single overlay without its base, as split returns")
            continue
        own = unpadded(node)
        if own is None:
            continue
        given[path] = own
        if path not in frames:
            problems.append(f"{path}: the stack does not adapt it; {nearest(path, frames)}")
        elif why := frames[path].misfit(own) or frames[path].too_wide(own):
            problems.append(f"{path}: {why}")
    if problems:
        raise StructureError(f"{caller}: the adapters do not fit the stack:\n" + grouped(problems))
    return map_adapted(lambda path, _: frames[path].fill(given.get(path)), stack)
