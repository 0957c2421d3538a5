"""Weights that were adapted and not trained yet, for starts that come after `init`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core import weights
from lora_jax.core.errors import StructureError
from lora_jax.core.patterns import Pattern, select
from lora_jax.core.tree import map_adapted, require_adapted
from lora_jax.core.weights import LoraWeight, require_base


def fresh_weights(caller: str, params: Any, targets: Pattern | None) -> dict[str, LoraWeight]:
    """The adapted weights of a joined tree that `targets` selects (None: all), by path.

    Raises:
      TargetError: an entry of `targets` matches no adapted weight.
      StructureError: there is none, one has no base or no values, or one has an update.
    """
    adapted = require_adapted(caller, params)
    nodes = {path: node for path, node in adapted.items() if isinstance(node, LoraWeight)}
    if not nodes:
        raise StructureError(f"{caller}: no weight of the tree has factors A and B")
    for path, node in nodes.items():
        require_base(path, node)
    chosen = nodes if targets is None else select("targets", targets, nodes)
    nodes = {path: node for path, node in nodes.items() if path in chosen}
    unknown = [path for path, node in nodes.items() if not _has_values(node)]
    if unknown:
        raise StructureError(
            f"{caller}: looks at values, which these do not have (shapes alone, or traced): "
            + ", ".join(unknown)
        )
    updates = jax.device_get(_have_updates({path: (n.a, n.b) for path, n in nodes.items()}))
    moved = [path for path in nodes if updates[path]]
    if moved:
        raise StructureError(
            f"{caller}: the update must be zero at the start, but neither A nor B is at "
            f'{", ".join(moved)}; take what init returns with init="kaiming"'
        )
    return nodes


@jax.jit
def _have_updates(factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    return {path: a.any() & b.any() for path, (a, b) in factors.items()}


def _has_values(node: LoraWeight) -> bool:
    arrays = (node.w, node.a, node.b)
    return not any(isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) for x in arrays)


def replaced(params: Any, nodes: Mapping[str, Any]) -> Any:
    """`params` with other nodes at these paths, all else the same objects."""
    return map_adapted(lambda path, n: _replaced(n, nodes[path]) if path in nodes else n, params)


def _replaced(before: Any, after: Any) -> Any:
    """`after`; layers of a stack that the configuration left out stay out of it."""
    if not isinstance(after, LoraWeight) or not after.layout.axes.count("b"):
        return after
    mask = np.asarray(before.scale) != 0
    return after if mask.all() or not mask.any() else weights.restrict(after, before.w, mask)
