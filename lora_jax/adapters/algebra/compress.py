"""`compress` and `resize`: the same adapters with other ranks."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.algebra.combined_factors import pad_rank
from lora_jax.adapters.algebra.placed import place_like
from lora_jax.adapters.algebra.slots import is_stack, map_slots, out_of_stack
from lora_jax.core.abstract import on_shapes
from lora_jax.core.checks import is_size, is_within
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.core.host_memory import on_device
from lora_jax.core.linalg import balanced, product_svd
from lora_jax.core.matrices import as_factors, factor_matrices
from lora_jax.core.paths import path_key
from lora_jax.core.tree import map_adapted, require_adapted
from lora_jax.core.weights import Adapted, LoraWeight


def compress(
    adapters: Any, rank: int | None = None, *, energy: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reduce the ranks of adapters, each weight to its best approximation.

    A and B become the truncated SVD of A·B, as A = U·√S and B = √S·Vᵀ in float32 (float64 if a
    factor is): no other update of this rank is closer (Eckart and Young, 1936). It is computed from
    QR decompositions of the factors, and A·B is never formed. A weight whose rank is small enough
    stays as it is. So do scales, fully trained leaves, trained rows, and magnitudes: with DoRA the
    direction is what is approximated.

    Args:
      adapters: an overlay, a joined tree, or a stack, whose adapters have a rank each.
      rank: the largest rank of the result.
      energy: the share of ‖ΔW‖² that each weight keeps at least, above 0 and up to 1; each weight
        takes the smallest rank with it, and at most `rank` where both are given. The layers of a
        stack share a rank, the largest that one of them takes. This looks at values.

    Returns:
      (the same tree with the smaller factors, the share of ‖ΔW‖² that each keeps, by path). Shares
      are floats, or traced within `jit`; 1 without an update. Those of a stack are `[slots]`.

    Raises:
      ConfigError: neither is given, or one is out of range; or the values that `energy` needs are
        traced or shapes alone.
      StructureError: the tree contains no adapters.

    >>> import jax.numpy as jnp, lora_jax
    >>> a, b = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.eye(2)
    >>> weight = lora_jax.LoraWeight(None, a, b, jnp.float32(1), layout=lora_jax.Layout("io"))
    >>> overlay, kept = compress({"w": weight}, energy=0.9)
    >>> overlay["w"].rank, round(kept["w"], 3)
    (1, 0.9)
    """
    if is_stack(adapters):
        return _compress_stack(adapters, rank, energy)
    adapters = out_of_stack("compress", adapters)
    nodes = require_adapted("compress", adapters)
    if rank is None and energy is None:
        raise ConfigError("compress: give rank=, the largest rank, or energy=, a share to keep")
    if rank is not None:
        _check_rank("compress", rank)
    if energy is not None:
        _check_energy(energy, nodes)
    kept: dict[str, Any] = {}

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        most = node.rank if rank is None else min(rank, node.rank)
        if energy is None and most == node.rank:
            kept[path] = 1.0
            return node
        if energy is not None:
            values = np.asarray(_singular_values(node))
            most = min(most, _rank_for(values, np.asarray(node.scale), energy))
        a, b, kept[path] = on_shapes(functools.partial(_truncate, rank=most), _bare(node))
        if most == node.rank:
            return node
        return place_like(dataclasses.replace(node, a=a, b=b), node)

    result = map_adapted(one, adapters)
    return result, {path: _as_float(share) for path, share in kept.items()}


def _compress_stack(
    adapters: Any, rank: int | None, energy: float | None
) -> tuple[Any, dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def one(_: int, overlay: Any) -> Any:
        smaller, kept = compress(overlay, rank, energy=energy)
        found.append(kept)
        return smaller

    result = map_slots(one, adapters)
    paths = dict.fromkeys(path for kept in found for path in kept)
    return result, {path: np.array([kept.get(path, 1.0) for kept in found]) for path in paths}


def resize(adapters: Any, rank: int, *, key: jax.Array | None = None) -> Any:
    """Change the rank of all adapters, larger or smaller.

    Where the rank grows, the update stays the same: A gets columns, and B rows, of zeros. Both have
    no gradient there, so that training would leave them at zero; with `key` the new columns of A
    are random instead, as those of a new adapter, and they train. A smaller rank is that of
    `compress`.

    Args:
      adapters: an overlay, a joined tree, or a stack.
      rank: the rank of each weight in the result; scales stay as they are.
      key: a random key for new columns of A, uniform in ±1/√fan_in; each path draws separately.

    Returns:
      The same tree with other factors. Fully trained leaves and trained rows stay as they are.

    Raises:
      ConfigError: the rank is not a positive integer.
      StructureError: the tree contains no adapters.

    >>> import jax.numpy as jnp, lora_jax
    >>> a, b, one = jnp.ones((4, 1)), jnp.ones((1, 3)), jnp.float32(1)
    >>> weight = lora_jax.LoraWeight(None, a, b, one, layout=lora_jax.Layout("io"))
    >>> resize({"w": weight}, 2)["w"].b
    Array([[1., 1., 1.],
           [0., 0., 0.]], dtype=float32)
    """
    require_adapted("resize", adapters)
    _check_rank("resize", rank)
    if is_stack(adapters):
        keys = lambda slot: None if key is None else jax.random.fold_in(key, slot)
        return map_slots(lambda slot, one: resize(one, rank, key=keys(slot)), adapters)
    smaller, _ = compress(adapters, rank)

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight) or node.rank == rank:
            return node
        own = None if key is None else path_key(key, path)
        a, b = on_shapes(functools.partial(_grow, rank=rank), _bare(node), own)
        return place_like(dataclasses.replace(node, a=a, b=b), node)

    return map_adapted(one, smaller)


@functools.partial(jax.jit, static_argnames="rank")
def _grow(node: LoraWeight, key: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
    a, b = pad_rank(node.a, node.b, rank, node.scale.ndim)
    if key is None:
        return a, b
    bound = 1 / math.sqrt(node.layout.fan_in(node.shape))
    shape = (*a.shape[:-1], rank - node.rank)
    new = jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(a.dtype)
    return jnp.concatenate([node.a, new], -1), b


def _bare(node: LoraWeight) -> LoraWeight:
    """Return the factors alone, in device memory."""
    return jax.tree.map(on_device, dataclasses.replace(node, w=None, key=None))


def _svd(node: LoraWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return U, S and Vᵀ of each matrix of A·B."""
    wide = accumulator(node.a.dtype, node.b.dtype)
    return product_svd(*factor_matrices(node.a.astype(wide), node.b.astype(wide), node.layout))


@jax.jit
def _values(node: LoraWeight) -> jax.Array:
    return _svd(node)[1]


def _singular_values(node: LoraWeight) -> jax.Array:
    """Return the singular values of A·B, `[*batch, n]`."""
    return _values(_bare(node))


@functools.partial(jax.jit, static_argnames="rank")
def _truncate(node: LoraWeight, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return A and B of this rank, and the share of ‖ΔW‖² that they keep."""
    u, s, vt = _svd(node)
    a, b = balanced((u, s, vt), jnp.ones((), s.dtype))
    a, b = pad_rank(a[..., :rank], b[..., :rank, :], rank, node.scale.ndim)
    a, b = as_factors(a.astype(node.a.dtype), b.astype(node.b.dtype), node.layout, node.shape)
    return a, b, _share(s, node.scale, rank)


def _rank_for(values: np.ndarray, scale: np.ndarray, energy: float) -> int:
    """Return the smallest rank with which each layer keeps a share of its squared norm.

    Args:
      values: singular values, `[*batch, n]`, falling. Those below n times the precision of the
        largest are rounding errors.
      scale: `[*batch]`; layers where it is 0 have no update.
      energy: the share.
    """
    precision = float(jnp.finfo(values.dtype).eps) * values.shape[-1]
    s = values.astype(np.float64).reshape(-1, values.shape[-1])[scale.reshape(-1) != 0]
    squares = np.where(s > precision * s.max(-1, keepdims=True, initial=0), s, 0) ** 2
    total = squares.sum(-1, keepdims=True)
    missing = total - np.cumsum(squares, -1)
    enough = missing <= (1 - energy) * total + np.finfo(np.float64).eps * values.shape[-1] * total
    ranks = np.argmax(enough, -1) + 1
    return int(max(ranks, default=1))


def _share(values: jax.Array, scale: jax.Array, rank: int) -> jax.Array:
    """Return Σ of the squares of the first singular values over that of all, of all layers."""
    squares = jnp.square(values * jnp.expand_dims(scale.astype(values.dtype), -1))
    total = squares.sum()
    return jnp.where(total > 0, squares[..., :rank].sum() / jnp.where(total > 0, total, 1), 1)


def _check_rank(caller: str, rank: Any) -> None:
    if not is_size(rank):
        raise ConfigError(f"{caller}: rank must be a positive integer, got {shown_value(rank)}")


def _check_energy(energy: Any, nodes: Mapping[str, Adapted]) -> None:
    if not is_within(energy, 0, 1) or energy == 0:
        raise ConfigError(
            f"compress: energy must be above 0 and at most 1, got {shown_value(energy)}"
        )
    abstract = jax.core.Tracer, jax.ShapeDtypeStruct
    for path, node in nodes.items():
        if any(isinstance(x, abstract) for x in jax.tree.leaves(node)):
            raise ConfigError(
                f"compress: {path}: energy= chooses ranks by the values, which are not known here; "
                "call it outside jit, on arrays, or give rank="
            )


def _as_float(x: Any) -> Any:
    abstract = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
    return x if abstract else float(x)
