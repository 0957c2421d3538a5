"""Two views of adapted parameters: one joined tree, or a base and an overlay of adapters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import StructureError
from lora_jax.core.paths import Pattern, flatten_with_paths, nearest, path_key, select
from lora_jax.core.weights import Adapted, LoraWeight, check_fits, is_adapted, require_base


def map_adapted(fn: Callable[[str, Adapted], Any], params: Any) -> Any:
    """`params` with `fn(path, node)` in place of every adapted node, all else the same objects."""
    nodes, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    return jax.tree_util.tree_unflatten(
        treedef, [fn(path, n) if is_adapted(n) else n for path, n in nodes.items()]
    )


def adapted_nodes(params: Any) -> dict[str, Adapted]:
    """The `LoraWeight`s and `TrainedLeaf`s of a tree by path."""
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    return {path: node for path, node in nodes.items() if is_adapted(node)}


def split(params: Any) -> tuple[Any, Any]:
    """(base, adapters): the original tree, and an overlay that is None but at the adapted leaves.

    `base` holds the very same arrays that were given to `init` (but for those that its start
    changed); `adapters` holds A, B and scale of each adapted weight and the leaves trained whole.
    One base serves many overlays, which can be stacked, vmapped over, checkpointed and shipped.
    `join` is the inverse. The scale is a leaf of the overlay, so an optimizer for it needs `freeze`
    too: weight decay would shrink it.

    Raises:
      StructureError: `params` holds no adapters, or is an overlay itself.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> base, adapters = split(lora_jax.init(jax.random.key(0), params, config))
    >>> base["kernel"] is params["kernel"], adapters["bias"], adapters["kernel"].a.shape
    (True, None, (4, 1))
    """
    if not adapted_nodes(params):
        raise StructureError(
            "split: the tree holds no adapted weights; init(key, params, ...) first"
        )

    def base_leaf(path: str, node: Adapted) -> Any:
        require_base(path, node)
        return node.w

    base = map_adapted(base_leaf, params)
    nodes, treedef = jax.tree_util.tree_flatten(params, is_leaf=is_adapted)
    overlay = [dataclasses.replace(n, w=None) if is_adapted(n) else None for n in nodes]
    return base, jax.tree_util.tree_unflatten(treedef, overlay)


def join(base: Any, adapters: Any) -> Any:
    """The joined tree of a base and an overlay of adapters; free at trace time.

    Args:
      base: a parameter tree without adapters.
      adapters: a partial tree of it, as `split` and `load` return.

    Raises:
      StructureError: the adapters do not fit the base; every difference is listed at once.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> base, adapters = split(params)
    >>> join(base, adapters)["kernel"].w is base["kernel"]
    True
    """
    leaves, treedef = flatten_with_paths(base, is_leaf=is_adapted)
    overlay, _ = flatten_with_paths(adapters, is_leaf=is_adapted)
    problems = [f"{path}: the base is adapted already" for path in adapted_nodes(base)]
    for path, node in overlay.items():
        if not is_adapted(node):
            problems.append(f"{path}: the overlay holds {type(node).__name__}, not an adapter")
        elif path not in leaves:
            problems.append(f"{path}: not in the base; {nearest(path, leaves)}")
        elif not is_adapted(leaves[path]):
            problems += check_fits(path, node, leaves[path])
    if not overlay:
        problems.append("the overlay holds no adapters")
    if problems:
        raise StructureError("join: the adapters do not fit the base:\n" + "\n".join(problems))
    return jax.tree_util.tree_unflatten(
        treedef,
        [
            dataclasses.replace(overlay[path], w=leaf) if path in overlay else leaf
            for path, leaf in leaves.items()
        ],
    )


def set_scale(params: Any, scale: Any, targets: Pattern | None = None) -> Any:
    """The adapters' scale set to `scale`, everywhere or at the paths that `targets` selects.

    The scale is a leaf, so a compiled function runs on the result as it is. It is the factor
    itself, not a multiple of the configured α/r. A leaf trained whole is in effect unless its scale
    is 0. Keep the tree that you had to switch back.

    Args:
      params: a joined tree or an overlay.
      scale: a number or scalar array.
      targets: a pattern as in `LoraConfig`, over the adapted paths; None for all.

    Raises:
      TargetError: an entry of `targets` matches no adapted path.
      StructureError: the tree holds no adapters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> float(set_scale(params, 0.5)["kernel"].scale)
    0.5
    """
    nodes = adapted_nodes(params)
    if not nodes:
        raise StructureError("set_scale: the tree holds no adapted weights")
    chosen = nodes if targets is None else select("targets", targets, nodes)

    def one(path: str, node: Adapted) -> Adapted:
        if path not in chosen:
            return node
        return dataclasses.replace(
            node, scale=jnp.broadcast_to(jnp.asarray(scale, node.scale.dtype), node.scale.shape)
        )

    return map_adapted(one, params)


def disable(params: Any) -> Any:
    """The adapters switched off: exactly the base's function, without recompilation.

    Works on a joined tree and on an overlay; `set_scale` switches them on again.

    Raises:
      StructureError: the tree holds no adapters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> float(disable(params)["kernel"].scale)
    0.0
    """
    return set_scale(params, 0)


def with_dropout(params: Any, key: jax.Array | None) -> Any:
    """Switch branch dropout on with `key`, or off with None.

    Each weight drops inputs of its branch at the rate of `LoraConfig.dropout`, with a key folded
    from `key` and its path; the base product sees every input. Use a fresh key every step, and take
    gradients outside: `jax.grad(lambda a: lora(loss)(with_dropout(join(base, a), key), batch))`.
    Lookups have no input to drop; a weight that the steps of a loop share drops the same in each.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1, dropout=0.1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> with_dropout(params, jax.random.key(1))["kernel"].key is not None
    True
    """

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight) or key is None or not node.dropout:
            return dataclasses.replace(node, key=None) if isinstance(node, LoraWeight) else node
        own = path_key(_typed(key), path)
        shape = node.scale.shape
        return dataclasses.replace(node, key=jax.random.split(own, shape) if shape else own)

    return map_adapted(one, params)


def _typed(key: jax.Array) -> jax.Array:
    """A typed key of a raw `uint32[2]` one, for a key must be one element a layer."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
