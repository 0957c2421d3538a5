"""Which axis of which parameter lies along which axis of a mesh: a table that a user can replace.

The tensor axes are those of Megatron (https://arxiv.org/abs/1909.08053): a layer that opens a block
(query, key, value, gate, up) is split along its outputs, the one that closes it (output, down)
along its inputs, so that a block needs one sum over the axis. The other axis is for FSDP.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import lookup
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.sharding.quantized import field_shardings

_OPENS = PartitionSpec("fsdp", "tensor")  # kernels are [in, out]
_CLOSES = PartitionSpec("tensor", "fsdp")
_WHOLE_OUTPUTS = PartitionSpec(("fsdp", "tensor"), None)
_EXPERTS_OPEN = PartitionSpec("expert", "fsdp", "tensor")
_BIAS = PartitionSpec("tensor")  # of a layer whose outputs are split

#: The end of a parameter's path, a module, or a regex for the whole path -> the axes of a mesh. The
#: first that matches is used; a parameter that none matches is replicated. A spec is for the last
#: axes of a parameter, so that stacked layers need no other one than single layers.
RULES: dict[str, PartitionSpec] = {
    # attention
    "query/kernel": _OPENS,
    "key/kernel": _OPENS,
    "value/kernel": _OPENS,
    "output/kernel": _CLOSES,
    "query/bias": _BIAS,
    "key/bias": _BIAS,
    "value/bias": _BIAS,
    # kernels of experts [experts, in, out], each on the devices of the axis "expert"
    "experts/gate/kernel": _EXPERTS_OPEN,
    "experts/up/kernel": _EXPERTS_OPEN,
    "experts/gate_up/kernel": _EXPERTS_OPEN,
    "experts/down/kernel": PartitionSpec("expert", "tensor", "fsdp"),
    "experts/gate_up/bias": PartitionSpec("expert", "tensor"),
    "experts/down/bias": PartitionSpec("expert", None),
    # several linear layers in one, along its second axis
    "qkv/kernel": PartitionSpec("fsdp", None, "tensor"),
    "qkv/bias": PartitionSpec(None, "tensor"),
    "mlp/input/kernel": PartitionSpec("fsdp", None, "tensor"),
    "mlp/input/bias": PartitionSpec(None, "tensor"),
    # feed-forward of Llama
    "gate/kernel": _OPENS,
    "up/kernel": _OPENS,
    "down/kernel": _CLOSES,
    "gate/bias": _BIAS,
    "up/bias": _BIAS,
    # Phi-3's q, k and v in one, and gate and up: a cut through the outputs would mix them
    "query_key_value/kernel": _WHOLE_OUTPUTS,
    "gate_up/kernel": _WHOLE_OUTPUTS,
    # feed-forward of BERT, which is closed by "output"
    "intermediate/kernel": _OPENS,
    "intermediate/bias": _BIAS,
    # [vocabulary, width], and the head [width, vocabulary]
    "embedding/embedding": PartitionSpec("tensor", "fsdp"),
    "word/embedding": PartitionSpec("tensor", "fsdp"),
    "position/embedding": PartitionSpec(None, "fsdp"),
    "head/kernel": PartitionSpec("fsdp", "tensor"),
}

#: Axes that consist of heads: path -> the axis, and their number's name in a configuration.
_HEADS = {
    "query/kernel": (-1, "num_attention_heads"),
    "query/bias": (-1, "num_attention_heads"),
    "key/kernel": (-1, "num_key_value_heads"),
    "key/bias": (-1, "num_key_value_heads"),
    "value/kernel": (-1, "num_key_value_heads"),
    "value/bias": (-1, "num_key_value_heads"),
    "qkv/kernel": (-1, "num_attention_heads"),
    "qkv/bias": (-1, "num_attention_heads"),
    "attention/output/kernel": (-2, "num_attention_heads"),
    "cross/output/kernel": (-2, "num_attention_heads"),
}


def shardings(
    shapes: Any, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None, config: Any = None
) -> Any:
    """Return how each parameter of a model lies on a mesh.

    Axes that the mesh does not have are ignored. An axis of a parameter whose size is not a
    multiple of the devices along it is replicated, and so is one that would be cut inside a head.

    Args:
      shapes: a tree of arrays or `ShapeDtypeStruct`s.
      mesh: of devices.
      rules: in place of `RULES`; a rule before those is `{"norm/scale": spec, **RULES}`.
      config: the model's, which has the numbers of its heads.

    Returns:
      A tree of `NamedSharding`s, one for each array: of a quantized weight one for each field.

    Raises:
      ConfigError: `mesh` is not a mesh of devices, or a rule does not fit a parameter.

    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> kernel = jax.ShapeDtypeStruct((12, 8, 16), "float32")  # 12 layers
    >>> tuple(shardings({"up": {"kernel": kernel}}, mesh)["up"]["kernel"].spec)
    (None, None, 'tensor')
    """
    if not isinstance(mesh, Mesh):
        raise ConfigError(
            f"mesh: must be a jax.sharding.Mesh of devices, got {shown_value(mesh)}; "
            "jax.make_mesh makes one"
        )
    table = RULES if rules is None else rules
    leaves, treedef = flatten_with_paths(shapes)

    def one(path: str, leaf: Any) -> Any:
        spec = _spec(path, leaf.shape, mesh, table, _heads(path, leaf, config))
        where = NamedSharding(mesh, spec)
        if not is_quantized(leaf):
            return where
        return dataclasses.replace(leaf, fields=field_shardings(leaf, where))

    return jax.tree_util.tree_unflatten(treedef, [one(p, x) for p, x in leaves.items()])


def _spec(
    path: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec],
    heads: Mapping[int, int],
) -> PartitionSpec:
    rule = lookup(rules, path, "rules")
    if rule is None:
        return PartitionSpec()
    key, spec = rule
    if not isinstance(spec, PartitionSpec):
        raise ConfigError(f"rules: {shown(key)} must be a PartitionSpec, got {shown_value(spec)}")
    if len(spec) > len(shape):
        raise ConfigError(
            f"rules: {shown(key)} is {spec}, of {len(spec)} axes, but {path} has the shape {shape}"
        )
    first, entries, used = len(shape) - len(spec), [], set[str]()
    for axis, entry in enumerate(spec, first):
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(name for name in names if name in mesh.shape)
        if used & set(names):
            raise ConfigError(f"rules: {shown(key)} is {spec}, which has an axis of the mesh twice")
        used |= set(names)
        names = _that_divide(names, heads.get(axis, shape[axis]), mesh)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*(None,) * first, *entries)


def _that_divide(names: tuple[str, ...], size: int, mesh: Mesh) -> tuple[str, ...]:
    """Return as many of the first axes as divide `size` together."""
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names


def _heads(path: str, leaf: Any, config: Any) -> dict[int, int]:
    """Return {axis: number of heads} of a parameter's axis of heads."""
    found = lookup(_HEADS, path, "rules")
    if found is None or config is None:
        return {}
    axis, name = found[1]
    # BERT has as many keys as queries
    count = getattr(config, name, config.num_attention_heads)
    return {axis + len(leaf.shape): count}
