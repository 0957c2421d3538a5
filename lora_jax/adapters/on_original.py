"""`on_original`: convert an adapter of a base that its initialization changed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.layout import subscripts
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import nearest
from lora_jax.core.slots import all_unpadded
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import Adapted, LoraWeight, TrainedRows, check_fits, is_adapted


def on_original(start: Any, trained: Any, base: Any) -> Any:
    """Convert a trained adapter into an ordinary one on the original base, of twice the rank.

    "pissa", "pissa_fast" and "olora" subtract `scale₀·A₀·B₀` from the base before training, so the
    trained weight is W + scale·A·B − scale₀·A₀·B₀. That is an adapter of W with the factors
    A' = [A, A₀] and B' = [scale·B; −scale₀·B₀] and scale 1 (PiSSA,
    https://arxiv.org/abs/2404.02948, appendix C). Where that overflows B's dtype, the larger scale
    stays the scale, and B' is divided by it. The result needs neither the changed base nor the
    initial factors: it can be saved, shipped and joined like any other adapter, and `disable` gives
    the original function.

    If `start` is a joined tree whose base leaf is still the original array ("kaiming" and all
    initializers that leave the base as it is), the trained factors are returned unchanged. So are
    fully trained leaves. DoRA magnitudes are kept, because the direction is the same matrix.
    Dropout is off in converted factors, because what they subtract must not be dropped.

    Args:
      start: what `init` returned, or its overlay.
      trained: the same after training, joined or an overlay.
      base: the parameters that were given to `init`.

    Returns:
      An overlay of `base`. `merge(join(base, overlay))` equals the merge of `trained` on its own
      base, up to what was lost when the changed base was rounded to its dtype or, with "loftq",
      quantized.

    Raises:
      StructureError: the three do not fit together; all differences are listed at once.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> base = {"kernel": jnp.arange(12.0).reshape(4, 3)}
    >>> start = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(rank=1, init="pissa"))
    >>> trained = jax.tree.map(lambda x: x + 1, lora_jax.split(start)[1])
    >>> overlay = on_original(start, trained, base)
    >>> want = lora_jax.merge(lora_jax.join(lora_jax.split(start)[0], trained))
    >>> got = lora_jax.merge(lora_jax.join(base, overlay))
    >>> overlay["kernel"].rank, bool(jnp.allclose(got["kernel"], want["kernel"], atol=1e-5))
    (2, True)
    """
    before, after = (all_unpadded(adapted_nodes(tree)) for tree in (start, trained))
    leaves, treedef = flatten_with_paths(base, is_leaf=is_adapted)
    problems = _differences(before, after, leaves)
    if problems:
        raise StructureError(
            "on_original: start, trained and base do not fit:\n" + grouped(problems)
        )
    nodes = {path: _convert(before[path], node, leaves[path]) for path, node in after.items()}
    return jax.tree_util.tree_unflatten(treedef, [nodes.get(path) for path in leaves])


def _convert(before: Adapted, after: Adapted, w: Any) -> Adapted:
    if not isinstance(after, LoraWeight) or not isinstance(before, LoraWeight) or before.w is w:
        return dataclasses.replace(after, w=None)
    larger = jnp.maximum(abs(before.scale), abs(after.scale))
    # Layers of a stack that are not adapted keep the scale 0.
    ones = jnp.where(larger == 0, 0, jnp.ones_like(after.scale))
    folded = _join_b(before, after, ones)
    fits = jnp.isfinite(folded).all()
    return dataclasses.replace(
        after,
        w=None,
        a=jnp.concatenate([after.a, before.a], axis=-1),
        b=jnp.where(fits, folded, _join_b(before, after, larger)),
        scale=jnp.where(fits, ones, larger),
        key=None,
        slot=None,
        dropout=0.0,
    )


def _join_b(before: LoraWeight, after: LoraWeight, unit: jax.Array) -> jax.Array:
    """Return `[scale · B; −scale₀ · B₀] / unit`, multiplied in float32 and rounded to B's dtype."""
    _, sub_b, sub_scale, _ = subscripts(after.layout)
    dtype = accumulator(after.b.dtype)

    def scaled(node: LoraWeight, sign: int) -> jax.Array:
        factor = jnp.where(unit == 0, 0, sign * node.scale / jnp.where(unit == 0, 1, unit))
        b, factor = node.b.astype(dtype), factor.astype(dtype)
        return jnp.einsum(f"{sub_b},{sub_scale}->{sub_b}", b, factor).astype(node.b.dtype)

    return jnp.concatenate([scaled(after, 1), scaled(before, -1)], len(unit.shape))


def _differences(
    before: dict[str, Adapted], after: dict[str, Adapted], leaves: dict[str, Any]
) -> list[str]:
    problems = [f"{path}: only in start" for path in before.keys() - after.keys()]
    problems += [f"{path}: only in trained" for path in after.keys() - before.keys()]
    for path, node in after.items():
        if path not in leaves:
            problems.append(f"{path}: not in the base; {nearest(path, leaves)}")
        elif is_adapted(leaves[path]):
            problems.append(f"{path}: the base is adapted itself; pass the base of split(params)")
        else:
            problems += check_fits(path, node, leaves[path])
        if path in before and _kind(before[path]) != _kind(node):
            problems.append(f"{path}: start has {_kind(before[path])}, trained {_kind(node)}")
    return problems + ([] if after else ["trained contains no adapters"])


def _kind(node: Adapted) -> str:
    """Describe what two nodes must agree in: the layout, sizes and rank, or the shape."""
    if isinstance(node, LoraWeight):
        return f"layout {node.layout.axes!r}, a {node.a.shape}, b {node.b.shape}"
    if isinstance(node, TrainedRows):
        return f"rows {node.rows} trained, {node.value.shape}"
    return f"a fully trained leaf {node.shape}"
