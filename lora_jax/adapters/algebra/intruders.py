"""`intruders` and `reduce_intruders`: directions that fine-tuning has put among the largest."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.algebra.compress import resize
from lora_jax.adapters.algebra.placed import place_like
from lora_jax.adapters.algebra.slots import out_of_stack
from lora_jax.core.algebra import dense
from lora_jax.core.checks import is_number, is_size, is_within
from lora_jax.core.dtypes import accumulator, round_to
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.foreign import shown_value
from lora_jax.core.host_memory import on_device
from lora_jax.core.linalg import matmul, truncated_svd
from lora_jax.core.matrices import as_factors, factor_matrices, map_matrices
from lora_jax.core.patterns import Pattern, select
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.sharding.meshes import gathered
from lora_jax.core.tree import map_adapted, require_adapted
from lora_jax.core.weights import Adapted, LoraWeight, require_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intruders:
    """The largest singular triplets of an adapted weight, and which of them are new.

    Attributes:
      new: bool `[*batch, k]`, whether the triplet is an intruder dimension.
      values: `[*batch, k]`, the singular values of W + ΔW, falling.
      similarity: `[*batch, k]`, the largest |cosine| between the singular vector and one of W.
    """

    new: Any
    values: Any
    similarity: Any

    @property
    def count(self) -> Any:
        """The number of intruder dimensions, `[*batch]`."""
        return self.new.sum(-1)


def intruders(
    params: Any, *, k: int = 10, threshold: float = 0.5, targets: Pattern | None = None
) -> dict[str, Intruders]:
    """Find the intruder dimensions of each adapted weight.

    Among the k largest singular vectors of W + ΔW, an intruder dimension is one that is like none
    of the pre-trained weight: |cos(u, u₀)| < threshold for every singular vector u₀ of W. LoRA
    makes them, full fine-tuning hardly does, and what a model forgets lies there
    (https://arxiv.org/abs/2410.21228, algorithm 1). The vectors are those of the outputs, as in the
    paper and in PEFT. Each weight takes two full singular value decompositions, in float32.

    Where W has equal singular values, its vectors are not unique, and neither is the answer.

    Args:
      params: a joined tree: the adapters, and the base that they adapt.
      k: how many of the largest singular vectors are examined.
      threshold: of the |cosine|, from 0 to 1.
      targets: a pattern as in `LoraConfig`, over the adapted paths; None for all factors.

    Returns:
      {path: `Intruders`}, of each matrix of a stack. DoRA counts with the weight that it means.
      Fully trained leaves and trained rows are left out.

    Raises:
      ConfigError: k is not a positive integer, or the threshold is out of range.
      StructureError: the tree contains no adapters, or is an overlay.
      TargetError: an entry of `targets` matches no adapted path.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, new = jnp.diag(jnp.array([4.0, 3.0, 2.0])), jnp.ones((3, 1)) / 3**0.5
    >>> weight = lora_jax.LoraWeight(w, new, new.T, jnp.float32(9), layout=lora_jax.Layout("io"))
    >>> found = intruders({"w": weight}, k=2, threshold=0.7)["w"]
    >>> int(found.count), found.new
    (1, Array([ True, False], dtype=bool))
    """
    _check("intruders", k, threshold)
    nodes = _chosen("intruders", params, targets)
    return {path: _examine(node, k, threshold)[0] for path, node in nodes.items()}


def reduce_intruders(
    params: Any,
    factor: float = 0.75,
    *,
    k: int = 10,
    threshold: float = 0.5,
    targets: Pattern | None = None,
    rank: int | None = None,
) -> Any:
    """Scale the intruder dimensions of adapted weights down, which undoes some of the forgetting.

    W + ΔW becomes W + ΔW + (factor − 1)·Σ σ·u·vᵀ over its intruder dimensions, see `intruders`
    (https://arxiv.org/abs/2410.21228, section 5). The result is an adapter of the same base: its
    rank is larger by the number of intruder dimensions, the most of a layer of a stack, unless
    `rank` says otherwise. This looks at values.

    Args:
      params: a joined tree.
      factor: of their singular values: 0 removes intruder dimensions, 1 keeps them.
      k: as for `intruders`.
      threshold: as for `intruders`.
      targets: as for `intruders`; other weights stay as they are.
      rank: of the result, everywhere; by default it is exact. The rank that the adapter had is what
        PEFT's `reduce_intruder_dimension` takes.

    Returns:
      The joined tree with other factors, of scale 1 where a weight has intruder dimensions.

    Raises:
      ConfigError: an option is out of range, or the values are traced or shapes alone.
      StructureError: as `intruders`; or a weight has DoRA.
      TargetError: as `intruders`.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, new = jnp.diag(jnp.array([4.0, 3.0, 2.0])), jnp.eye(3)[:, :1]
    >>> weight = lora_jax.LoraWeight(w, new, new.T, jnp.float32(2), layout=lora_jax.Layout("io"))
    >>> reduce_intruders({"w": weight}, 0)["w"].rank  # there are none: W and W + ΔW are diagonal
    1
    """
    _check("reduce_intruders", k, threshold)
    params = out_of_stack("reduce_intruders", params)
    if not is_number(factor) or not np.isfinite(float(factor)):
        raise ConfigError(
            f"reduce_intruders: factor must be a finite number, got {shown_value(factor)}"
        )
    nodes = _chosen("reduce_intruders", params, targets)
    problems = [
        f"{path}: DoRA, of which a dimension cannot be scaled alone; make factors of it first: "
        'combine([adapters], method="svd", rank=..., base=base)'
        for path, node in nodes.items()
        if node.magnitude is not None
    ]
    if problems:
        raise StructureError("reduce_intruders:\n" + grouped(problems))
    for path, node in nodes.items():
        if any(
            isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(node)
        ):
            raise ConfigError(
                f"reduce_intruders: {path}: ranks depend on the values, which are not known here; "
                "call it outside jit, on arrays"
            )

    def one(path: str, node: Adapted) -> Adapted:
        if path not in nodes or not isinstance(node, LoraWeight):
            return node
        found, u, vt = _examine(node, k, threshold)
        count = int(np.asarray(found.new).sum(-1).max(initial=0))
        if not count:
            return node
        bare = jax.tree.map(on_device, dataclasses.replace(node, w=None, key=None))
        a, b, scale = _scale_down(bare, found, u, vt, factor, count=count)
        return place_like(dataclasses.replace(node, a=a, b=b, scale=scale, key=None), node)

    reduced = map_adapted(one, params)
    return reduced if rank is None else resize(reduced, rank)


def _examine(node: LoraWeight, k: int, threshold: float) -> tuple[Intruders, Any, Any]:
    """Return what `Intruders` says, U `[*batch, fan_in, k]` and Vᵀ `[*batch, k, fan_out]`."""
    wide = accumulator(*(x.dtype for x in (node.a, node.b, node.w)))
    rest = jax.tree.map(on_device, dataclasses.replace(node, w=None, key=None))
    node = dataclasses.replace(rest, w=node.w)
    return _triplets(node, k, threshold, wide)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _triplets(node: LoraWeight, k: int, threshold: float, wide: Any) -> Any:
    layout = dataclasses.replace(node.layout, lookup_only=False)
    before = dequantized(on_device(node.w)).astype(wide)

    def one(_: jax.Array, before: jax.Array, after: jax.Array) -> Any:
        _, _, known = truncated_svd(before, min(before.shape))
        u, values, vt = truncated_svd(after, min(k, *after.shape))
        similarity = jnp.abs(matmul(vt, known.T)).max(-1)
        return Intruders(similarity < threshold, values, similarity), u, vt

    return map_matrices(one, jax.random.key(0), layout, before, dense(node, wide))


@functools.partial(jax.jit, static_argnames="count")
def _scale_down(
    node: LoraWeight, found: Intruders, u: Any, vt: Any, factor: Any, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return A, B and scale with `count` more ranks: √|c|·u and ±√|c|·vᵀ, c = (factor − 1)·σ."""
    wide = found.values.dtype
    a, b = factor_matrices(node.a.astype(wide), node.b.astype(wide), node.layout)
    order = jnp.argsort(~found.new, axis=-1, stable=True)[..., :count]  # intruders first
    pick = lambda x: jnp.take_along_axis(x, order, -1)
    root = jnp.sqrt(jnp.where(pick(found.new), jnp.abs(factor - 1) * pick(found.values), 0))
    sign = jnp.where(factor > 1, 1, -1).astype(wide)
    new_a = jnp.take_along_axis(u, order[..., None, :], -1) * root[..., None, :]
    new_b = jnp.take_along_axis(vt, order[..., :, None], -2) * root[..., :, None] * sign
    scale = gathered(node.scale)
    a = jnp.concatenate([a * scale.astype(wide)[..., None, None], new_a], -1)
    b = jnp.concatenate([b, new_b], -2)
    a, b = round_to(a, node.a.dtype).astype(node.a.dtype), round_to(b, node.b.dtype)
    a, b = as_factors(a, b.astype(node.b.dtype), node.layout, node.shape)
    on = (scale != 0) | (found.count > 0)
    return a, b, on.astype(scale.dtype)


def _chosen(caller: str, params: Any, targets: Pattern | None) -> dict[str, LoraWeight]:
    """Return the nodes with factors that `targets` selects, by path."""
    nodes = require_adapted(caller, params)
    if targets is not None:
        nodes = {path: nodes[path] for path in select("targets", targets, nodes)}
    factors = {path: node for path, node in nodes.items() if isinstance(node, LoraWeight)}
    for path, node in factors.items():
        require_whole(path, node)
    return factors


def _check(caller: str, k: Any, threshold: Any) -> None:
    if not is_size(k):
        raise ConfigError(f"{caller}: k must be a positive integer, got {shown_value(k)}")
    if not is_within(threshold, 0, 1):
        raise ConfigError(f"{caller}: threshold must be from 0 to 1, got {shown_value(threshold)}")
