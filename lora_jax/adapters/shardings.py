"""`shardings`: the tree of shardings of adapted parameters, for `jit`, Orbax and `device_put`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_jax.adapters.init import init
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import Placement, arrays_of
from lora_jax.core.weights import Adapted, is_adapted
from lora_jax.engine.custom_rules import Rule


def shardings(
    params: Any,
    config: LoraConfig | None = None,
    fn: Callable | None = None,
    *args: Any,
    rules: Mapping[str, Rule] | None = None,
    argnum: int = 0,
    argname: str | None = None,
    fsdp: str | Sequence[str] | None = None,
    slots: str | None = None,
    **kwargs: Any,
) -> Any:
    """Return the sharding of every array of adapted parameters.

    The base decides: A `[*batch, *in, rank]` is sharded as the in axes of its weight, B
    `[*batch, rank, *out]` and a magnitude as the out axes, all three and the scale as an axis of
    experts. Mesh axes that shard the examples (FSDP) are left out, the rank is never sharded, and
    neither is an axis that its part of the mesh does not divide evenly. A fully trained leaf is
    sharded as its base is. `init` and the functions that load files place what they make alike.
    In a stack of adapters the slots are on every device, unless `slots` names a mesh axis for them.

    Use the tree in `jax.device_put(params, ...)`, as `out_shardings` of a jitted `init`, which sees
    no shardings along automatic axes, or to restore a checkpoint with Orbax.

    Args:
      params: a joined tree, an overlay whose arrays are placed, or a base together with `config`;
        of arrays, or of `ShapeDtypeStruct`s that have a `NamedSharding`.
      config: what to adapt, as for `init`; only for a base.
      fn: the function that will run on the parameters, as for `init`; only for a base.
      *args: its other example arguments.
      rules: as for `init`.
      argnum: as for `init`.
      argname: as for `init`.
      fsdp: the names of the mesh axes that shard weights only to save memory, as for `init`. None
        also leaves factors where they are, if that is on the mesh of their weight.
      slots: the name of the mesh axis that shards the slots of a stack; its other axes are not
        sharded along it.
      **kwargs: example keyword arguments.

    Returns:
      A tree with the structure of the adapted parameters, with a sharding in place of each array.
      An array that lies on no mesh is replicated on that of the others; if none lies on a mesh, or
      they lie on several, it stays on its device, by default the first one.

    Raises:
      ConfigError: `fsdp` or `slots` names no axis of the base's mesh; or `fn` is given without
        `config`.
      TargetError, LayoutError: as `init`.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    >>> kernel = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, P("fsdp", "tensor")))
    >>> found = shardings({"kernel": kernel}, lora_jax.LoraConfig(rank=2))["kernel"]
    >>> found.w.spec, found.a.spec, found.b.spec
    (P('fsdp', 'tensor'), P(), P(None, 'tensor'))
    """
    if config is not None:
        options: Any = {"rules": rules, "argnum": argnum, "argname": argname, "fsdp": fsdp}
        shapes = jax.tree.map(_abstract, params)
        params = init(jax.random.key(0), shapes, config, fn, *args, **options, **kwargs)
    elif fn is not None:
        raise ConfigError("shardings: fn decides about a base: give the config too")
    leaves, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    found = Placement.of("shardings", _bases(leaves.values()), fsdp, slots=slots)

    def one(leaf: Any) -> Any:
        if not is_adapted(leaf):
            return _of_arrays(leaf, found.mesh)
        return _of_node(leaf, found, keep=fsdp is None and slots is None)

    return jax.tree_util.tree_unflatten(treedef, [one(leaf) for leaf in leaves.values()])


def _bases(leaves: Iterable[Any]) -> list[Any]:
    """Return the leaves of a base; of an overlay, which has none, the arrays of its nodes."""
    bases = [leaf.w if is_adapted(leaf) else leaf for leaf in leaves]
    return jax.tree.leaves(list(leaves) if all(x is None for x in bases) else bases)


def _of_node(node: Adapted, placement: Placement, keep: bool) -> Adapted:
    """Return the node with the shardings of its arrays; `keep` those on the base's mesh."""
    by_rule = {} if node.w is None else placement.shardings(node, node.w) or {}
    base = named_sharding(node.w)

    def one(field: str, x: Any) -> Any:
        own = named_sharding(x)
        is_placed = own is not None and (base is None or own.mesh == base.mesh)
        if field in by_rule and not (keep and is_placed):
            return by_rule[field]
        return _of_arrays(x, placement.mesh)

    return dataclasses.replace(node, **{f: one(f, x) for f, x in arrays_of(node).items()})


def _of_arrays(x: Any, mesh: Any) -> Any:
    """Return the sharding of an array, or of each array of a quantized weight."""
    return (
        jax.tree.map(lambda array: _of_leaf(array, mesh), x)
        if is_quantized(x)
        else _of_leaf(x, mesh)
    )


def _of_leaf(x: Any, mesh: Any) -> Any:
    """Return the sharding of an array that the rule leaves where it lies."""
    own = named_sharding(x)
    if own is not None:
        return own
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    found = getattr(x, "sharding", None)
    return SingleDeviceSharding(jax.devices()[0]) if found is None else found


def _abstract(x: Any) -> Any:
    """Return the shape, dtype and sharding of an array on a mesh; anything else as it is."""
    own = named_sharding(x)
    return x if own is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)
