"""Turn the factors of a checkpoint into A and B of a `LoraWeight`, and back: exact reshapes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.files.orbax.rows import LAYERS, RANK, Row


@dataclasses.dataclass(frozen=True)
class Fit:
    """A row whose axes have the sizes of a weight and its factors."""

    row: Row
    a: tuple[str, ...]
    b: tuple[str, ...]
    sizes: Mapping[str, int]


def fits(row: Row, weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> list[Fit]:
    """Return the ways in which the shapes of a weight, A and B have the axes of a row."""
    if len(weight) != len(row.letters):
        return []
    sizes = dict(zip(row.letters, weight, strict=True))
    found = []
    for axes_a, axes_b in row.alternatives():
        rank = a[-1] if a and axes_a[-1] == RANK else 0
        extra = {x: n for x, n in _paired(axes_b, b) if x not in sizes}
        known = {**extra, **sizes, RANK: rank}
        own_a = _axes(axes_a, a, known, row.inputs if row.flat else ())
        own_b = _axes(axes_b, b, known, row.outputs if row.flat else ())
        if rank and own_a and own_b:
            found.append(Fit(row, own_a, own_b, known))
    return found


def _paired(axes: Sequence[str], shape: Sequence[int]) -> list[tuple[str, int]]:
    return list(zip(axes, shape, strict=True)) if len(axes) == len(shape) else []


def _axes(
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    joined: Sequence[str],
) -> tuple[str, ...]:
    """Return the axes of a factor of this shape, those in `joined` apart; none if it has others."""
    if shape == tuple(sizes[x] for x in axes):
        return axes
    if len(joined) < 2:
        return ()
    groups = [tuple(joined) if x == joined[0] else (x,) for x in axes if x not in joined[1:]]
    fits = shape == tuple(math.prod(sizes[x] for x in group) for group in groups)
    return tuple(x for group in groups for x in group) if fits else ()


def to_weight(fit: Fit, a: np.ndarray, b: np.ndarray, scale: float) -> LoraWeight:
    """Return the adapter of one weight, without the weight.

    An output that A has too becomes a part of the rank: each of its indices has its own rows of A,
    and B is diagonal in it. So the rank is that output's size times the checkpoint's.
    """
    row, sizes = fit.row, fit.sizes
    a = a.reshape([sizes[x] for x in fit.a])
    b = b.reshape([sizes[x] for x in fit.b])
    batch = [LAYERS] if LAYERS in row.letters else []
    own = [x for x in row.outputs if x in fit.a]
    a = _rearranged(a, fit.a, (*batch, *row.inputs, *own, RANK))
    b = _rearranged(b, fit.b, (*batch, *own, RANK, *row.outputs), own, sizes)
    rank = sizes[RANK] * math.prod(sizes[x] for x in own)
    lead = [sizes[x] for x in batch]
    return LoraWeight(
        None,
        a.reshape(*lead, *(sizes[x] for x in row.inputs), rank),
        b.reshape(*lead, rank, *(sizes[x] for x in row.outputs)),
        np.full(lead, scale, np.float32),
        layout=Layout(row.layout),
    )


def _rearranged(
    x: np.ndarray,
    axes: Sequence[str],
    wanted: Sequence[str],
    diagonal: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Return an array with other axes: what is not wanted is summed.

    With `diagonal` letters, which are twice among those wanted, it is diagonal in each of them.
    """
    letters = {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys((*axes, *wanted)))}
    first = {name: letters[name].upper() for name in diagonal}
    seen: set[str] = set()
    out = ""
    for name in wanted:
        out += first[name] if name in first and name not in seen else letters[name]
        seen.add(name)
    terms, arrays = ["".join(letters[x] for x in axes)], [x.astype(_sum_dtype(x))]
    for name in diagonal:
        terms.append(first[name] + letters[name])
        arrays.append(np.eye((sizes or {})[name], dtype=arrays[0].dtype))
    return np.einsum(f"{','.join(terms)}->{out}", *arrays).astype(x.dtype)


def _sum_dtype(x: np.ndarray) -> Any:
    """Return a dtype in which nothing is lost in a sum over a few heads."""
    return np.float64 if x.dtype.itemsize >= 4 else np.float32


def written_rank(row: Row, node: LoraWeight) -> int:
    """Return the rank of a node's factors in a checkpoint, without padding."""
    rank, own = node.a.shape[-1], _own_size(row, node)
    return rank // own if own > 1 and _is_diagonal(row, node) else rank


def from_weight(
    row: Row, node: LoraWeight, scale: float, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B as a checkpoint has them, for a format whose scale is `scale`.

    The rest of the node's scale is multiplied into B. An output that A has too gets the same A for
    each of its indices, unless B is diagonal in it, as `to_weight` makes it. Where B is summed over
    an axis, all but its first index are zeros.

    Args:
      row: of the weight.
      node: the adapter, with arrays on the host.
      scale: of the format, at this rank.
      rank: at least `written_rank`; further components are zeros.
    """
    a, b = np.asarray(node.a), np.asarray(node.b)
    own = np.asarray(node.scale, np.float64)
    rest = own.reshape(own.shape + (1,) * (b.ndim - own.ndim)) / scale
    if not np.all(rest == 1):
        b = (b.astype(np.float64) * rest).astype(b.dtype)
    axes_a, axes_b = next(iter(row.alternatives()))
    batch = [LAYERS] if LAYERS in row.letters else []
    mine = [x for x in row.outputs if x in axes_a]
    sizes = _output_sizes(row, node)
    in_a, in_b = (*batch, *row.inputs, RANK), (*batch, RANK, *row.outputs)
    if mine and written_rank(row, node) < a.shape[-1]:
        counts = [sizes[x] for x in mine]
        a = a.reshape(*a.shape[:-1], *counts, -1)
        b = b.reshape(*b.shape[: len(batch)], *counts, -1, *b.shape[len(batch) + 1 :])
        in_a, in_b = (*in_a[:-1], *mine, RANK), (*batch, *mine, RANK, *row.outputs)
    elif mine:
        a = np.broadcast_to(a[..., None], (*a.shape, math.prod(sizes[x] for x in mine)))
        a = a.reshape(*a.shape[:-1], *(sizes[x] for x in mine))
        in_a = (*in_a, *mine)
    kept = [x for x in axes_b if x == RANK or x in row.letters]
    a = _padded(_rearranged(a, in_a, axes_a), axes_a, rank)
    b = _padded(_diagonal(b, in_b, kept), kept, rank)
    for i in (i for i, x in enumerate(axes_b) if x not in kept):
        wide = np.zeros((*b.shape[:i], node.a.shape[len(batch)], *b.shape[i:]), b.dtype)
        wide[(slice(None),) * i + (0,)] = b
        b = wide
    return a, b


def _output_sizes(row: Row, node: LoraWeight) -> dict[str, int]:
    return dict(zip(reversed(row.outputs), reversed(node.b.shape), strict=False))


def _own_size(row: Row, node: LoraWeight) -> int:
    """Return how many A's a weight has in a checkpoint."""
    axes_a, _ = next(iter(row.alternatives()))
    sizes = _output_sizes(row, node)
    return math.prod(sizes[x] for x in row.outputs if x in axes_a)


def _is_diagonal(row: Row, node: LoraWeight) -> bool:
    """Return whether each of a weight's A's has its own part of the rank, and B no other."""
    axes_a, _ = next(iter(row.alternatives()))
    count, rank = _own_size(row, node), node.a.shape[-1]
    if rank % count:
        return False
    batch = int(LAYERS in row.letters)
    mine = [1 + i for i, x in enumerate(row.outputs) if x in axes_a]
    b = np.asarray(node.b).reshape(-1, *node.b.shape[batch:])
    b = np.moveaxis(b, [i + 1 for i in mine], range(2, 2 + len(mine)))
    b = b.reshape(len(b), count, rank // count, count, -1)
    off = b * ~np.eye(count, dtype=bool)[None, :, None, :, None]
    return not off.any()


def _diagonal(x: np.ndarray, axes: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Return an array with these axes, its diagonal in those that it has twice."""
    letters = {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys(axes))}
    own, out = ("".join(letters[name] for name in names) for names in (axes, wanted))
    return np.einsum(f"{own}->{out}", x)


def _padded(x: np.ndarray, axes: Sequence[str], rank: int) -> np.ndarray:
    """Return a factor with zeros up to a rank."""
    at = list(axes).index(RANK)
    return np.pad(x, [(0, (rank - n) * (i == at)) for i, n in enumerate(x.shape)])
