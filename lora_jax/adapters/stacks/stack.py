"""`stack` and `unstack`: overlays of different ranks, targets and kinds as one, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.stacks.frame import Frame, frame_of
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.slots import slot_dropout, slot_has_magnitude, slot_rank
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, is_adapted


def stack(adapters: Sequence[Any], *, rank: int | None = None) -> Any:
    """Stack overlays of one base into one overlay, with the slots as the first axis of each leaf.

    Ranks may differ: A and B are padded with zeros to the largest. Padding gets a gradient of zero,
    so whatever optimizer and weight decay there is, it stays zero. Scales, targets, rates of
    dropout and kinds (LoRA, rsLoRA, DoRA) may differ too; where an adapter has no target that
    another has, its factors are zero. Factors of different dtypes get the wider one.

    The stack works in `jax.vmap` over its first axis, in `join(base, stack)` for
    `lora(fn, adapters_of=...)`, and in `select`, `set_slot` and `unstack`.

    Args:
      adapters: overlays, as `split` and `load` return, of the same base.
      rank: pad to this rank, so that larger adapters fit in later; the largest by default.

    Raises:
      ConfigError: `rank` is less than an adapter's.
      StructureError: there is nothing to stack; the overlays are of different trees, contain their
        base, or adapt a weight in different ways. All differences are listed.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> base = {"kernel": jnp.ones((4, 3))}
    >>> def new(rank):
    ...     params = lora_jax.init(jax.random.key(rank), base, lora_jax.LoraConfig(rank=rank))
    ...     return lora_jax.split(params)[1]
    >>> stack([new(1), new(2)])["kernel"].a.shape
    (2, 4, 2)
    """
    found, treedef = _open(adapters)
    frames = _frames(found, rank)
    slots = [
        {path: frame.fill(nodes.get(path)) for path, frame in frames.items()} for nodes in found
    ]
    stacked = {
        path: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(slot[path] for slot in slots))
        for path in frames
    }
    return _rebuild(treedef, stacked)


def unstack(stack: Any) -> list[Any]:
    """Return the overlays of a stack, each with its own rank, targets, dropout and kind.

    Raises:
      StructureError: `stack` contains no stacked adapters.
      ConfigError: called under tracing, where ranks are not known; use `select`.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> both = lora_jax.stack([lora_jax.split(params)[1]] * 2)
    >>> [overlay["w"].a.shape for overlay in unstack(both)]
    [(4, 1), (4, 1)]
    """
    count = slots_of("unstack", stack)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(stack)):
        raise ConfigError(
            "unstack: the ranks of a traced stack are not known; use select(stack, slot), whose "
            "adapters keep the padding"
        )

    def overlay(slot: int) -> Any:
        return map_adapted(lambda _, node: _taken_out(node, slot), stack)

    return [overlay(slot) for slot in range(count)]


def slots_of(caller: str, stack: Any) -> int:
    """Return how many adapters a stack has, or raise if it is not a stack."""
    counts = {n for node in adapted_nodes(stack).values() if (n := node.slots) is not None}
    if len(counts) != 1:
        raise StructureError(
            f"{caller}: this is not a stack of adapters; make one by stack([adapters, ...])"
        )
    return counts.pop()


def _open(adapters: Sequence[Any]) -> tuple[list[dict[str, Adapted]], Any]:
    """Return the adapted nodes of each overlay by path, and the structure of their common tree."""
    if not isinstance(adapters, Sequence) or not adapters:
        raise StructureError("stack: pass a sequence of one or more overlays, as split returns")
    trees = [flatten_with_paths(x, is_leaf=lambda n: n is None or is_adapted(n)) for x in adapters]
    first = trees[0][0]
    problems = []
    for number, (leaves, _) in enumerate(trees):
        for path in sorted(leaves.keys() ^ first.keys()):
            problems.append(f"{path}: adapter {number} is of another tree than adapter 0")
        for path, node in leaves.items():
            if node is not None and not is_adapted(node):
                problems.append(f"{path}: adapter {number} holds {type(node).__name__}")
            elif node is not None and node.w is not None:
                problems.append(f"{path}: adapter {number} contains its base; split it first")
            elif node is not None and node.slots is not None:
                problems.append(f"{path}: adapter {number} is a stack itself; unstack it first")
    if problems:
        raise StructureError("stack: not overlays of one base:\n" + grouped(problems))
    found = [{path: n for path, n in leaves.items() if n is not None} for leaves, _ in trees]
    if not any(found):
        raise StructureError("stack: the overlays contain no adapters")
    return found, trees[0][1]


def _frames(found: Sequence[dict[str, Adapted]], rank: int | None) -> dict[str, Frame]:
    """Return the frame of every path that an overlay adapts."""
    largest = max(
        (n.rank for x in found for n in x.values() if isinstance(n, LoraWeight)), default=0
    )
    if rank is not None and rank < largest:
        raise ConfigError(f"stack: rank={rank} is less than the largest adapter's, {largest}")
    frames, problems = {}, []
    for path in dict.fromkeys(path for nodes in found for path in nodes):
        nodes = [x[path] for x in found if path in x]
        frames[path] = frame_of(nodes, rank)
        problems += [f"{path}: {why}" for node in nodes if (why := frames[path].misfit(node))]
    if problems:
        raise StructureError("stack: the adapters do not fit together:\n" + grouped(problems))
    return frames


def _rebuild(treedef: Any, nodes: dict[str, Adapted]) -> Any:
    """Return the tree of an overlay with these nodes."""
    tree = jax.tree_util.tree_unflatten(treedef, [_Place()] * treedef.num_leaves)
    flat, _ = flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, _Place))
    return jax.tree_util.tree_unflatten(treedef, [nodes.get(path) for path in flat])


class _Place:
    """Stands where an overlay may have a node."""


def _taken_out(node: Adapted, slot: int) -> Any:
    """Return the adapter of one slot as it was before it was stacked; None if it has none."""
    one = jax.tree.map(lambda x: x[slot], node)
    if not isinstance(one, LoraWeight):
        off = isinstance(one, TrainedLeaf) and not np.any(one.value) and not np.any(one.scale)
        return None if off else one
    if one.slot is None:  # stacked by hand
        return one
    rank = int(slot_rank(one.slot))
    if rank == 0:
        return None
    batch = len(one.layout.positions("b"))
    cut = (*(slice(None) for _ in range(batch)), slice(rank))
    return dataclasses.replace(
        one,
        a=one.a[..., :rank],
        b=one.b[cut],
        magnitude=one.magnitude if slot_has_magnitude(one.slot) else None,
        slot=None,
        dropout=round(float(slot_dropout(one.slot)), 7),  # the float32 nearest to it
    )
