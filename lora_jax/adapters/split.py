"""`split` and `join`: adapted parameters as one tree, or as a base and an overlay of adapters."""

import dataclasses
from typing import Any

import jax

from lora_jax.adapters import flax_bytes
from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.tree import adapted_nodes, map_adapted, require_adapted, unwrapped
from lora_jax.core.weights import Adapted, check_fits, is_adapted, is_weight, require_base


def split(params: Any) -> tuple[Any, Any]:
    """Split adapted parameters into (base, adapters); `join` is the inverse.

    `base` is the original tree, with the very same arrays that were given to `init`, except those
    that the initializer changed. `adapters` is an overlay: None everywhere but at adapted leaves,
    where it has A, B and scale, or the trained value. One base serves many overlays, which can be
    stacked, vmapped over, checkpointed and shipped. The scale is a leaf of the overlay, so its
    optimizer needs `freeze` too: weight decay would shrink the scale.

    Raises:
      StructureError: `params` contains no adapters, or is an overlay itself.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> base, adapters = split(lora_jax.init(jax.random.key(0), params, config))
    >>> base["kernel"] is params["kernel"], adapters["bias"], adapters["kernel"].a.shape
    (True, None, (4, 1))
    """
    flax_bytes.register()
    params = unwrapped(params)
    require_adapted("split", params)

    def base_leaf(path: str, node: Adapted) -> Any:
        require_base(path, node)
        return node.w

    base = map_adapted(base_leaf, params)
    nodes, treedef = jax.tree_util.tree_flatten(params, is_leaf=is_weight)
    overlay = [dataclasses.replace(n, w=None) if is_adapted(n) else None for n in nodes]
    return base, jax.tree_util.tree_unflatten(treedef, overlay)


def base_of(params: Any) -> Any:
    """Return the base of a joined tree, or `params` itself if it contains no adapters.

    >>> base_of({"kernel": 1.0})
    {'kernel': 1.0}
    """
    return split(params)[0] if adapted_nodes(params) else params


def join(base: Any, adapters: Any) -> Any:
    """Join a base and an overlay of adapters into one tree; costs nothing under tracing.

    Args:
      base: a parameter tree without adapters.
      adapters: an overlay of it, as `split` and `load` return, or a stack of overlays, as `stack`
        returns: for `lora(fn, adapters_of=...)`.

    Raises:
      StructureError: the adapters do not fit the base; every difference is listed at once.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> base, adapters = split(params)
    >>> join(base, adapters)["kernel"].w is base["kernel"]
    True
    """
    flax_bytes.register()
    leaves, treedef = flatten_with_paths(base, is_leaf=is_adapted)
    overlay, _ = flatten_with_paths(adapters, is_leaf=is_adapted)
    problems = [f"{path}: the base is adapted already" for path in adapted_nodes(base)]
    for path, node in overlay.items():
        if not is_adapted(node):
            problems.append(f"{path}: the overlay holds {type(node).__name__}, not an adapter")
        elif path not in leaves:
            problems.append(f"{path}: not in the base; {nearest(path, leaves)}")
        elif not is_adapted(leaves[path]):
            problems += check_fits(path, node, leaves[path], stacked=True)
    if not overlay:
        problems.append("the overlay contains no adapters")
    if problems:
        raise StructureError("join: the adapters do not fit the base:\n" + grouped(problems))
    return jax.tree_util.tree_unflatten(
        treedef,
        [
            dataclasses.replace(overlay[path], w=leaf) if path in overlay else leaf
            for path, leaf in leaves.items()
        ],
    )
