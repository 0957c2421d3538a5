"""`stack` and `unstack`: overlays of different ranks, targets and kinds as one, and back."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters import flax_bytes
from lora_jax.adapters.stacks.frame import Frame, frame_of
from lora_jax.core.abstract import on_shapes
from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import arrays_of, put
from lora_jax.core.slots import is_known, unpadded
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, is_adapted


def stack(adapters: Sequence[Any], *, rank: int | None = None) -> Any:
    """Stack overlays of one base into one overlay, with the slots as the first axis of each leaf.

    Ranks may differ: A and B are padded with zeros to the largest. Padding gets a gradient of zero,
    so it stays zero under every optimizer that moves nothing without a gradient, whatever its
    weight decay. Scales, targets, layers, rates of dropout and kinds (LoRA, rsLoRA, DoRA) may
    differ too; where an adapter has no target that another has, its factors are zero. Factors of
    different dtypes get one that represents both.

    The stack works in `jax.vmap` over its first axis, in `join(base, stack)` for
    `lora(fn, adapters_of=...)`, and in `select`, `set_slot` and `unstack`. On a mesh the slots are
    on every device; see `shardings` for others.

    Args:
      adapters: overlays, as `split` and `load` return, of the same base; arrays or
        `ShapeDtypeStruct`s.
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
    flax_bytes.register()
    found, treedef = _open(adapters)
    frames = _frames(found, rank)
    stacked = {
        path: _stacked(frame, [x.get(path) for x in found]) for path, frame in frames.items()
    }
    return _rebuild(treedef, stacked)


def unstack(stack: Any) -> list[Any]:
    """Return the overlays of a stack, each with its own rank, targets, dropout and kind.

    They are what was stacked, to the bit, in the dtypes of the stack. A joined tree gives joined
    trees, which share its base.

    Raises:
      StructureError: `stack` contains no stacked adapters.
      ConfigError: called under tracing or on shapes, where ranks are not known; use `select`.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, lora_jax.LoraConfig(1))
    >>> both = lora_jax.stack([lora_jax.split(params)[1]] * 2)
    >>> [overlay["w"].a.shape for overlay in unstack(both)]
    [(4, 1), (4, 1)]
    """
    count = slots_of("unstack", stack)
    unknown = [p for p, n in adapted_nodes(stack).items() if n.slot is not None and not is_known(n)]
    if unknown:
        raise ConfigError(
            f"unstack: {unknown[0]} has no values here, and so its ranks are not known; use "
            "select(stack, slot), whose adapters keep the padding"
        )

    numbers = jax.device_get({path: node.slot for path, node in adapted_nodes(stack).items()})

    def take(slot: int, path: str, node: Adapted) -> Any:
        arrays = {field: x for field, x in arrays_of(node).items() if field != "w"}
        own = numbers[path]
        one = dataclasses.replace(node, w=None, **_in_slot(arrays, slot))
        known = None if own is None else np.asarray(own[slot])  # on the host: asked for its values
        kept = unpadded(dataclasses.replace(one, slot=known))
        return node.w if kept is None else dataclasses.replace(kept, w=node.w)

    def overlay(slot: int) -> Any:
        return map_adapted(functools.partial(take, slot), stack)

    return [overlay(slot) for slot in range(count)]


@jax.jit
def _in_slot(arrays: dict[str, jax.Array], slot: Any) -> dict[str, jax.Array]:
    take = lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False)
    return {field: take(x) for field, x in arrays.items()}


def slots_of(caller: str, stack: Any) -> int:
    """Return how many adapters a stack has, or raise if it is not a stack."""
    counts = {path: node.slots for path, node in adapted_nodes(stack).items()}
    if set(counts.values()) <= {None}:
        raise StructureError(
            f"{caller}: this is not a stack of adapters; make one by stack([adapters, ...])"
        )
    most = max(n for n in counts.values() if n is not None)
    other = [
        f"{path}: has {n or 'no'} slots, others {most}" for path, n in counts.items() if n != most
    ]
    if other:
        raise StructureError(
            f"{caller}: these have other slots than the rest; make the stack by "
            "stack([adapters, ...]):\n" + grouped(other)
        )
    return most


def _open(adapters: Sequence[Any]) -> tuple[list[dict[str, Adapted]], Any]:
    """Return the adapted nodes of each overlay by path, and the structure of their common tree."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, str) or not adapters:
        raise StructureError("stack: pass a sequence of one or more overlays, as split returns")
    trees = [flatten_with_paths(x, is_leaf=lambda n: n is None or is_adapted(n)) for x in adapters]
    first = trees[0][0]
    problems = [f"adapter {n}: is None" for n, tree in enumerate(adapters) if tree is None]
    if problems:
        raise StructureError("stack: not overlays of one base:\n" + grouped(problems))
    for number, (leaves, _) in enumerate(trees):
        for path in sorted(leaves.keys() ^ first.keys()):
            problems.append(f"{path}: adapter {number} is of another tree than adapter 0")
        for path, node in leaves.items():
            problems += [f"{path}: adapter {number} {why}" for why in _wrong(node)]
    if problems:
        raise StructureError("stack: not overlays of one base:\n" + grouped(problems))
    found = [
        {p: own for p, n in leaves.items() if n is not None and (own := unpadded(n)) is not None}
        for leaves, _ in trees
    ]
    if not any(found):
        raise StructureError("stack: the overlays contain no adapters")
    return found, trees[0][1]


def _wrong(node: Any) -> list[str]:
    """Return what is wrong with what an overlay holds at one place."""
    if node is None:
        return []
    if not is_adapted(node):
        return [f"holds {type(node).__name__}, not an adapter; pass overlays, as split returns"]
    if node.w is not None:
        return ["contains its base; split it first"]
    return [] if node.slots is None else ["is a stack itself; unstack it first"]


def _frames(found: Sequence[dict[str, Adapted]], rank: int | None) -> dict[str, Frame]:
    """Return the frame of every path that an overlay adapts."""
    largest = max(
        (n.rank for x in found for n in x.values() if isinstance(n, LoraWeight)), default=0
    )
    if rank is not None and not is_integer(rank):
        raise ConfigError(f"stack: rank must be an integer, got {rank!r}")
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


def _stacked(frame: Frame, nodes: Sequence[Adapted | None]) -> Adapted:
    """Return the adapters of one weight as one, on the mesh on which they are."""
    made: Any = on_shapes(functools.partial(_stack_in, frame), list(nodes))
    found = [x for x in nodes if x is not None]
    if not isinstance(found[0], TrainedLeaf):  # `jit` remembers a layout with other uses
        made = dataclasses.replace(made, layout=found[0].layout)
    return dataclasses.replace(
        made, **{f: _placed(x, found, f) for f, x in arrays_of(made).items()}
    )


def _placed(x: Any, nodes: Sequence[Adapted], field: str) -> Any:
    """Return a stacked array sharded as those of the adapters are, its slots on every device."""
    if isinstance(x, jax.core.Tracer):
        return x
    shardings = [s for node in nodes if (s := named_sharding(getattr(node, field))) is not None]
    if not shardings:
        return x
    mesh, spec = shardings[0].mesh, shardings[0].spec
    return put(x, NamedSharding(mesh, PartitionSpec(None, *spec) if any(spec) else PartitionSpec()))


@functools.partial(jax.jit, static_argnums=0)
def _stack_in(frame: Frame, nodes: Sequence[Adapted | None]) -> Adapted:
    filled = [frame.fill(node) for node in nodes]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)


def _rebuild(treedef: Any, nodes: dict[str, Adapted]) -> Any:
    """Return the tree of an overlay with these nodes."""
    tree = jax.tree_util.tree_unflatten(treedef, [_Place()] * treedef.num_leaves)
    flat, _ = flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, _Place))
    return jax.tree_util.tree_unflatten(treedef, [nodes.get(path) for path in flat])


class _Place:
    """Stands where an overlay may have a node."""
