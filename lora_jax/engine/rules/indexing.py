"""Rules for indexing: the factors that have an indexed axis are indexed, the others stay."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine.arithmetic import to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import Axis, LazyWeight, is_lazy
from lora_jax.engine.rules.registry import PrimitiveRule, rule
from lora_jax.engine.rules.views import mark_indexed, viewed

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Stacked weights indexed by a layer number stay lazy; a single row read is a lookup."""
    lazy, *starts = args
    if not is_lazy(lazy) or any(map(is_lazy, starts)) or len(starts) != len(lazy.axes):
        return NotImplemented
    moved, axes, lookup = lazy, list(lazy.axes), False
    for i, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        old = axes[i]
        if size != lazy.shape[i]:
            axes[i] = moved.new_axis(old.origins, skip=i)
            moved = moved.map_axis(old, _slicer(start, size), axes[i])
            if size == 1:
                lookup = lookup or _only_factor(lazy, old) == "a"
                moved = mark_indexed(moved, old)
    outs = viewed(eqn, moved, axes, *starts)
    return [to_dense(out) for out in outs] if lookup else outs


def _slicer(start: Any, size: int) -> Callable[[jax.Array, int], jax.Array]:
    """`fn(array, dimension)`: what the primitive does, which clamps and knows no negative index."""

    def slice_at(x: jax.Array, at: int) -> jax.Array:
        starts = [start if i == at else jnp.zeros_like(start) for i in range(x.ndim)]
        sizes = [size if i == at else n for i, n in enumerate(x.shape)]
        return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)

    return slice_at


def _only_factor(lazy: LazyWeight, axis: Axis) -> str:
    """The factor that alone has `axis`: picking from it reads rows, as an embedding does.

    Empty for a batch axis, which both have: picking from it selects whole weights.
    """
    factors = [name for name in lazy.holders(axis) if name in ("a", "b")]
    return factors[0] if len(factors) == 1 else ""


@rule(RULES, "gather")
def _gather(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """`w[ids]` along any axes: each factor is gathered along those of them that it has."""
    lazy, indices = args
    if not is_lazy(lazy) or is_lazy(indices):
        return NotImplemented
    gather = _Gather(eqn, lazy, indices)
    if not gather.is_factored:
        return NotImplemented
    moved = lazy.map_members(gather.member)
    for axis in gather.picked:
        moved = mark_indexed(moved, axis)
    factors = [_only_factor(lazy, axis) for axis in gather.picked]
    rows_of = next(filter(None, factors), "") if lazy.a is not None else "a"
    origin = dataclasses.replace(moved.origin, looked_up=rows_of)
    outs = viewed(eqn, dataclasses.replace(moved, origin=origin), gather.axes, indices)
    # Rows of A are an activation, as an embedding's are. But one list of ids that names no more
    # rows than there are may permute or select inputs: there the reader of the rows decides.
    return [to_dense(out) for out in outs] if "a" in factors and not gather.is_list else outs


class _Gather:
    """A gather of a view: the axes of its result, and the same gather on a factor."""

    def __init__(self, eqn: Any, lazy: LazyWeight, indices: jax.Array):
        self._params, self._view, self._indices = eqn.params, lazy, indices
        numbers, self._sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        self._collapsed = numbers.collapsed_slice_dims
        self._batching = dict(
            zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        )
        self._fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        # dimension of the view -> column of the indices. An index for an axis taken whole (as
        # `vmap` of a dynamic slice makes) can only be 0, unless what is out of bounds is filled.
        self._columns = {
            i: column
            for column, i in enumerate(numbers.start_index_map)
            if self._fills or not self._whole(i) or i in self._collapsed
        }
        self.picked = [lazy.axes[i] for i in self._columns if self._sizes[i] == 1]
        n_ids, paired = indices.ndim - 1, {j: lazy.axes[i] for i, j in self._batching.items()}
        counts = [n for j, n in enumerate(indices.shape[:-1]) if j not in paired]
        is_single = len(counts) == len(self.picked) == len(self._columns) == 1
        #: whether one axis is picked from by one list of ids, of which there are no more than rows
        self.is_list = is_single and counts[0] <= lazy.sizes[self.picked[0]]
        reorders = is_single and counts[0] == lazy.sizes[self.picked[0]]
        origins = self.picked[0].origins if reorders else ()
        ids = [paired.get(j, lazy.new_axis(origins, skip=j)) for j in range(n_ids)]
        self._id_axes = ids
        self._offset = {
            i: axis if self._whole(i) else lazy.new_axis(axis.origins, skip=n_ids + i)
            for i, axis in enumerate(lazy.axes)
            if i not in self._collapsed and i not in self._batching
        }
        kept, new = iter(self._offset.values()), iter(ids)
        ndim = len(self._offset) + n_ids
        self.axes = [next(kept) if i in numbers.offset_dims else next(new) for i in range(ndim)]

    def _whole(self, i: int) -> bool:
        return self._sizes[i] == self._view.shape[i]

    @property
    def is_factored(self) -> bool:
        """Whether gathering the factors gathers the update."""
        indexed = {*self._columns, *self._batching}
        cut = [i for i in range(len(self._sizes)) if not self._whole(i) or i in self._collapsed]
        held = [self._view.holders(self._view.axes[i]) for i in self._columns]
        # What lies out of bounds gets the base's filling alone, so some factor must be zero there.
        zeroed = not self._fills or self._view.a is None or all({"a", "b"} & set(h) for h in held)
        value = self._params["fill_value"] if self._fills else None
        takes_no_gain = value is not None and value != 0 and not math.isnan(value)
        misfit = takes_no_gain and self._view.gain is not None
        return zeroed and set(cut) <= indexed and not misfit

    def member(self, array: jax.Array, names: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        """A factor, gathered along those of the picked axes that it has."""
        where = {self._view.axes.index(n): p for p, n in enumerate(names) if n in self._view.axes}
        columns = {i: column for i, column in self._columns.items() if i in where}
        if not columns:
            return array, names
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return self._keys(array, names, columns)
        batching = {i: j for i, j in self._batching.items() if i in where}
        collapsed = tuple(where[i] for i in self._collapsed if i in where)
        sizes, kept = list(array.shape), list(names)
        for i, p in where.items():
            sizes[p] = self._sizes[i]
            kept[p] = self._offset.get(i, names[p])
        gone = {*collapsed, *(where[i] for i in batching)}
        # JAX wants them in the order of the operand, which a factor may hold otherwise.
        paired = sorted((where[i], j) for i, j in batching.items())
        offset = [name for p, name in enumerate(kept) if p not in gone]
        n_ids = len(self._id_axes)
        # Ids that are unique or sorted as rows of all columns need not be so in some of them.
        same = columns == self._columns and batching == self._batching
        taken = lax.gather(
            array,
            self._ids(list(columns.values())),
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(n_ids, n_ids + len(offset))),
                collapsed_slice_dims=tuple(sorted(collapsed)),
                start_index_map=tuple(where[i] for i in columns),
                operand_batching_dims=tuple(at for at, _ in paired),
                start_indices_batching_dims=tuple(j for _, j in paired),
            ),
            tuple(sizes),
            unique_indices=same and self._params["unique_indices"],
            indices_are_sorted=same and self._params["indices_are_sorted"],
            mode=self._params["mode"],
            fill_value=0,
        )
        return taken, [*self._id_axes, *offset]

    def _ids(self, columns: Sequence[int]) -> jax.Array:
        if list(columns) == list(range(self._indices.shape[-1])):
            return self._indices
        return jnp.stack([self._indices[..., column] for column in columns], -1)

    def _keys(
        self, keys: jax.Array, names: tuple[Axis, ...], columns: dict[int, int]
    ) -> tuple[jax.Array, Sequence[Axis]]:
        """Of stacked dropout keys that of the first weight picked, which serves them all."""
        first = self._indices.reshape(-1, self._indices.shape[-1])[0]
        for i, column in columns.items():
            at = names.index(self._view.axes[i])
            keys = lax.dynamic_index_in_dim(keys, first[column], at, keepdims=False)
            names = names[:at] + names[at + 1 :]
        return keys, names


def densify_rows(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The operands of a product, rows looked up on its left made an array where that is cheaper.

    `embedding[ids] @ matrix` multiplies rows like any activation. What contracts the ids
    themselves, or has the rows on its right, reads them as a weight: `x @ w[permutation]`.
    """
    rows, x = args
    if not is_lazy(rows) or not rows.origin.looked_up or rows.a is None:
        return args
    (summed, _), _ = eqn.params["dimension_numbers"]
    picked_from = rows.a_axes if rows.origin.looked_up == "a" else rows.b_axes
    if any(rows.axes[i] in picked_from for i in summed):
        return args
    # r multiply-adds an entry of the rows, against r for each of x and each of the product
    if math.prod(rows.shape) > math.prod(x.shape) + math.prod(eqn.outvars[0].aval.shape):
        return args
    return to_dense(rows), x
