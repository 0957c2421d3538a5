"""Change adapters without recompilation: their scale, on or off, and dropout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import path_key
from lora_jax.core.patterns import Pattern, select
from lora_jax.core.slots import is_present
from lora_jax.core.tree import map_adapted, require_adapted
from lora_jax.core.weights import Adapted, LoraWeight


def set_scale(params: Any, scale: Any, targets: Pattern | None = None) -> Any:
    """Set the adapters' scale, everywhere or at the paths that `targets` selects.

    The scale is a leaf, so a compiled function runs on the result without recompilation. `scale` is
    the factor itself, not a multiple of the configured α/r. A fully trained leaf is in effect
    unless its scale is 0. To switch back, keep the old tree. In a stack of adapters, slots that do
    not adapt a leaf stay without effect.

    Args:
      params: a joined tree or an overlay.
      scale: a number or scalar array; for a stack also one number per slot, `[slots]`.
      targets: a pattern as in `LoraConfig`, over the adapted paths; None for all.

    Raises:
      TargetError: an entry of `targets` matches no adapted path.
      StructureError: the tree contains no adapters.
      ConfigError: `scale` does not have one number per slot.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> float(set_scale(params, 0.5)["kernel"].scale)
    0.5
    """
    nodes = require_adapted("set_scale", params)
    chosen = nodes if targets is None else select("targets", targets, nodes)

    def one(path: str, node: Adapted) -> Adapted:
        if path not in chosen:
            return node
        # A copy for each node: a step that donates them may not get one buffer twice.
        own = jnp.array(scale, node.scale.dtype, copy=True)
        return dataclasses.replace(node, scale=_where_adapted(node, _per_slot(path, node, own)))

    return map_adapted(one, params)


def _per_slot(path: str, node: Adapted, scale: jax.Array) -> jax.Array:
    """Return the scales of a node, from one for all or, of a stack, from one per slot."""
    own = node.scale.shape
    if scale.ndim and node.slots is not None:
        if scale.shape != (node.slots,):
            raise ConfigError(
                f"set_scale: {path} is a stack of {node.slots} adapters; pass a number, or one per "
                f"slot, [{node.slots}], not an array {list(scale.shape)}"
            )
        scale = scale.reshape(node.slots, *(1 for _ in own[1:]))
    return jnp.broadcast_to(scale, own)


def _where_adapted(node: Adapted, scale: jax.Array) -> jax.Array:
    """Return the scales, 0 in slots whose adapter has no such target: they may have no effect."""
    if node.slot is None:
        return scale
    present = is_present(node)
    on = jnp.expand_dims(present, range(present.ndim, scale.ndim))
    return jnp.where(on, scale, jnp.zeros_like(scale))


def disable(params: Any) -> Any:
    """Switch the adapters off: the result is exactly the base's function, without recompilation.

    Works on a joined tree and on an overlay; `set_scale` switches them on again.

    Raises:
      StructureError: the tree contains no adapters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> float(disable(params)["kernel"].scale)
    0.0
    """
    return set_scale(params, 0)


def with_dropout(params: Any, key: jax.Array | None) -> Any:
    """Switch dropout of the adapters' inputs on with `key`, or off with None.

    Each adapter drops its inputs at the rate of `LoraConfig.dropout`, with a key folded from `key`
    and its path; the base weight still sees every input. Use a new key in every step, and take
    gradients outside: `jax.grad(lambda a: lora(loss)(with_dropout(join(base, a), key), batch))`.
    Lookups have no input to drop. Each adapter of a stack has its own rate and its own key.

    A weight that the function uses in several places drops other inputs in each, also where that
    is one jitted module called twice. Under `jax.vmap`, inside the function or around it, each
    example drops its own, as it does in a batch. A weight that several steps of a loop (`scan`,
    `while`) share drops the same inputs in each.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1, dropout=0.1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> with_dropout(params, jax.random.key(1))["kernel"].key is not None
    True
    """

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight) or key is None or not node.dropout:
            return dataclasses.replace(node, key=None) if isinstance(node, LoraWeight) else node
        own = path_key(_typed_key(key), path)
        shape = node.scale.shape
        return dataclasses.replace(node, key=jax.random.split(own, shape) if shape else own)

    return map_adapted(one, params)


def _typed_key(key: jax.Array) -> jax.Array:
    """Return a typed key, also for a raw `uint32[2]` one: keys are split into one per layer."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
