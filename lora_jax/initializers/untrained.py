"""Adapted weights that are not trained yet, for the initializers that run after `init`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import StructureError
from lora_jax.core.patterns import Pattern, select
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import put
from lora_jax.core.tree import map_adapted, require_adapted
from lora_jax.core.weights import LoraWeight, require_base, restrict


def require_untrained(caller: str, params: Any, targets: Pattern | None) -> dict[str, LoraWeight]:
    """Return the adapted weights of a joined tree that `targets` selects (None: all), by path.

    Raises:
      TargetError: an entry of `targets` matches no adapted weight.
      StructureError: there are none, or one has no base, no values, or an update that is not zero.
    """
    adapted = require_adapted(caller, params)
    nodes = {path: node for path, node in adapted.items() if isinstance(node, LoraWeight)}
    if not nodes:
        raise StructureError(f"{caller}: no weight in the tree has factors A and B")
    for path, node in nodes.items():
        require_base(path, node)
    chosen = nodes if targets is None else select("targets", targets, nodes)
    nodes = {path: node for path, node in nodes.items() if path in chosen}
    abstract = [path for path, node in nodes.items() if not _has_values(node)]
    if abstract:
        raise StructureError(
            f"{caller}: needs concrete arrays, but these weights are tracers or ShapeDtypeStructs: "
            f"{', '.join(abstract)}. Call it outside jit, on initialized parameters"
        )
    updates = jax.device_get(_have_updates({path: (n.a, n.b) for path, n in nodes.items()}))
    moved = [path for path in nodes if updates[path]]
    if moved:
        raise StructureError(
            f"{caller}: the update scale * A @ B must be zero, but neither A nor B is zero in "
            f'{", ".join(moved)}. Pass what init returns with init="kaiming", before training'
        )
    return nodes


@jax.jit
def _have_updates(factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    return {path: a.any() & b.any() for path, (a, b) in factors.items()}


def _has_values(node: LoraWeight) -> bool:
    arrays = (node.w, node.a, node.b)
    return not any(isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) for x in arrays)


def put_nodes(params: Any, nodes: Mapping[str, Any]) -> Any:
    """Return `params` with these nodes at their paths, and all else the same objects."""

    def one(path: str, node: Any) -> Any:
        if path not in nodes:
            return node
        return _place_like(node, _keep_left_out_layers(node, nodes[path]))

    return map_adapted(one, params)


def _place_like(before: LoraWeight, after: Any) -> Any:
    """Return `after` with its factors where those of `before` lie, if that is on a mesh."""
    if not isinstance(after, LoraWeight):
        return after
    shardings = {field: named_sharding(getattr(before, field)) for field in ("a", "b", "scale")}
    placed = {f: put(getattr(after, f), where) for f, where in shardings.items() if where}
    return dataclasses.replace(after, **placed)


def _keep_left_out_layers(before: Any, after: Any) -> Any:
    """Return `after`, without effect in layers of a stack that the configuration left out."""
    if not isinstance(after, LoraWeight) or "b" not in after.layout.axes:
        return after
    mask = np.asarray(before.scale) != 0
    return after if mask.all() or not mask.any() else restrict(after, before.w, mask)
