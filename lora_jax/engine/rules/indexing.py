"""Rules for indexing: the factors that have an indexed axis are indexed, the others stay."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.quantized.parts import blocked_axis, with_fields
from lora_jax.engine import named_axes
from lora_jax.engine.arithmetic import to_dense
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import ROW, SLOT, Axis, LazyWeight, is_lazy
from lora_jax.engine.quantized import moves
from lora_jax.engine.quantized.view import QuantizedView, Step
from lora_jax.engine.rows.places import Place
from lora_jax.engine.rows.slots import NoPlaceForRows
from lora_jax.engine.rules.registry import PrimitiveRule, rule
from lora_jax.engine.rules.views import mark_indexed, on_base, view_of, view_with

RULES: dict[str, PrimitiveRule] = {}


@rule(RULES, "dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Slice the factors. A weight picked from a stack stays lazy; reading one row is a lookup."""
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
    outs = view_of(eqn, moved, axes, *starts)
    waits = [isinstance(out.w, QuantizedView) and not out.w.is_movable for out in outs]
    return [_looked_up(ctx, eqn, *x) for x in zip(outs, waits, strict=True)] if lookup else outs


def _slicer(start: Any, size: int) -> Callable[[jax.Array, int], jax.Array]:
    """Return `fn(array, dimension)`, which slices as the primitive does.

    It clamps a start that is out of bounds, and a negative one does not count from the end.
    """

    def slice_at(x: jax.Array, at: int) -> jax.Array:
        starts = [start if i == at else jnp.zeros_like(start) for i in range(x.ndim)]
        sizes = [size if i == at else n for i, n in enumerate(x.shape)]
        return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)

    return slice_at


def _only_factor(lazy: LazyWeight, axis: Axis) -> str:
    """Return the factor that alone has `axis`: picking from it reads rows, as an embedding does.

    Empty for a batch axis, which both have: picking from it selects whole weights.
    """
    factors = [name for name in lazy.holders(axis) if name in ("a", "b")]
    return factors[0] if len(factors) == 1 else ""


@rule(RULES, "gather")
def _gather(ctx: Context, eqn: Any, args: Sequence[Any]) -> Any:
    """Gather each factor along those of the indexed axes that it has, for `w[ids]` in any form."""
    lazy, indices = args
    if not is_lazy(lazy) or is_lazy(indices):
        return NotImplemented
    place = None
    if lazy.row is not None and lazy.row.slot.ndim:
        place = ctx.place_of_rows(eqn, 1)
        if place.inner > 1 or indices.shape[place.axis] != len(lazy.row.slot):
            raise NoPlaceForRows
    gather = _Gather(eqn.params, lazy, indices, place)
    if not gather.is_factored:
        return NotImplemented
    moved = lazy.map_members(gather.member)
    for axis in gather.picked:
        moved = mark_indexed(moved, axis)
    factors = [_only_factor(lazy, axis) for axis in gather.picked]
    rows_of = next(filter(None, factors), "") if lazy.a is not None else "a"
    origin = dataclasses.replace(moved.origin, looked_up=rows_of)
    moved = dataclasses.replace(moved, origin=origin)
    w = gather.codes(eqn) if isinstance(lazy.w, QuantizedView) else on_base(eqn, moved, indices)
    out = view_with(eqn, moved, gather.axes, w)
    # Rows of A are an activation, as an embedding's are. But one list of ids, no longer than the
    # axis, may permute or select inputs: there it depends on what the rows meet.
    rows = "a" in factors or (lazy.a is None and not ctx.infers)
    if not rows or gather.is_list:
        return [out]
    return [_looked_up(ctx, eqn, out, isinstance(lazy.w, QuantizedView) and gather.divides_blocks)]


def _looked_up(ctx: Context, eqn: Any, rows: LazyWeight, takes_all: bool) -> jax.Array:
    """Return rows that were looked up; say so where a whole table is dequantized for them."""
    if takes_all:
        rows = ctx.dequantize(rows, eqn, " (blocks lie along the axis of its rows)")
    return to_dense(rows)


@dataclasses.dataclass(frozen=True)
class _Gather:
    """A gather of a view: the axes of its result, and the same gather on a factor.

    `w[ids]` with w `[vocabulary, features]` and ids `[batch, time]` has indices `[batch, time, 1]`,
    start_index_map (0,), collapsed_slice_dims (0,), offset_dims (2,) and slice_sizes (1, features):

        columns      {0: 0}                   axis 0 of w is indexed, by column 0 of the indices
        picked       [vocabulary]             each index picks one entry of it
        id_axes      [batch, time]            new axes of the result
        offset_axes  {1: features}            axis 1 of w is still there
        axes         [batch, time, features]

    A `[vocabulary, rank]` has the picked axis: it becomes `[batch, time, rank]` by the same gather
    with slice_sizes (1, rank). B `[rank, features]` does not have it, and stays.
    """

    params: dict[str, Any]
    view: LazyWeight
    indices: jax.Array  # [*ids, columns]
    rows: Place | None = None  # where the ids have the rows of a batch with many adapters

    @functools.cached_property
    def columns(self) -> dict[int, int]:
        """Which column of the indices says where along a dimension of the view: {3: 0, 1: 1}."""
        # An index along an axis of which all is taken (`vmap` of a dynamic slice makes such) can
        # only be 0, unless what is out of bounds is filled.
        return {
            i: column
            for column, i in enumerate(self._numbers.start_index_map)
            if self._fills or not self._takes_all(i) or i in self._collapsed
        }

    @functools.cached_property
    def picked(self) -> list[Axis]:
        """The axes of the view of which each index picks one entry."""
        return [self.view.axes[i] for i in self.columns if self._sizes[i] == 1]

    @functools.cached_property
    def id_axes(self) -> list[Axis]:
        """The axes of the ids, `[*ids]`: the view's where they are paired with it, else new."""
        paired = {j: self.view.axes[i] for i, j in self._batching.items()}
        # a list as long as the axis may be a permutation: its axis still comes from the weight's
        length = self._list_length
        reorders = length is not None and length == self.view.sizes[self.picked[0]]
        origins = self.picked[0].origins if reorders else ()
        n_ids = self.indices.ndim - 1
        own = [paired.get(j, self.view.new_axis(origins, skip=j)) for j in range(n_ids)]
        rows = None if self.rows is None else self.rows.axis
        return [ROW if j == rows else axis for j, axis in enumerate(own)]

    @functools.cached_property
    def offset_axes(self) -> dict[int, Axis]:
        """The dimensions of the view that are still in the result, `{dimension: axis}`."""
        # all of the dimension: the same axis; a part of it: a new one
        n_ids = self.indices.ndim - 1
        return {
            i: axis if self._takes_all(i) else self.view.new_axis(axis.origins, skip=n_ids + i)
            for i, axis in enumerate(self.view.axes)
            if i not in self._collapsed and i not in self._batching
        }

    @property
    def axes(self) -> list[Axis]:
        """The axes of the result: the offset axes at `offset_dims`, the id axes at the others."""
        kept, ids = iter(self.offset_axes.values()), iter(self.id_axes)
        ndim = len(self.offset_axes) + len(self.id_axes)
        return [next(kept if i in self._numbers.offset_dims else ids) for i in range(ndim)]

    @property
    def is_list(self) -> bool:
        """Whether one list of ids picks from one axis, and is no longer than that."""
        length = self._list_length
        return length is not None and length <= self.view.sizes[self.picked[0]]

    @property
    def is_factored(self) -> bool:
        """Whether gathering the factors gathers the update."""
        view, indexed = self.view, {*self.columns, *self._batching}
        cut = [i for i in range(len(self._sizes)) if not self._takes_all(i) or i in self._collapsed]
        held = [view.holders(view.axes[i]) for i in self.columns]
        # What is out of bounds gets the base's fill value alone: there some factor must be zero.
        zeroed = not self._fills or view.a is None or all({"a", "b"} & set(h) for h in held)
        value = self.params["fill_value"] if self._fills else None
        takes_no_gain = value is not None and value != 0 and not math.isnan(value)
        misfit = takes_no_gain and view.gain is not None
        return zeroed and set(cut) <= indexed and not misfit

    def codes(self, eqn: Any) -> QuantizedView:
        """Return the base view that is gathered from codes and scales."""
        view: QuantizedView = self.view.w
        if self.divides_blocks:
            return moves.apply(eqn, [view, self.indices])[0]
        at = blocked_axis(view.weight)
        blocks = self.view.new_axis(skip=1000)  # a name that no axis of the result has
        names = tuple(blocks if i == at else axis for i, axis in enumerate(self.view.axes))
        wanted = [blocks if axis == self.view.axes[at] else axis for axis in self.axes]

        def one(x: jax.Array) -> jax.Array:
            taken, axes = self.member(x, names)
            return named_axes.arrange(taken, axes, wanted, {})

        weight = with_fields(view.weight, one, wanted.index(blocks))
        gathered = dataclasses.replace(view, weight=weight)
        return self._filled(gathered) if self._fills else gathered

    @property
    def divides_blocks(self) -> bool:
        """Whether the base has to be dequantized before it is gathered."""
        view: QuantizedView = self.view.w
        if not view.is_movable:
            return True
        at = blocked_axis(view.weight)
        indexed = at in self.columns and self._sizes[at] == 1
        return indexed or at in self._batching or not self._takes_all(at)

    def _filled(self, gathered: QuantizedView) -> QuantizedView:
        """Return gathered rows with the fill value where ids are out of bounds."""
        fill = self.params["fill_value"]
        there = jnp.ones([self.view.sizes[axis] for axis in self.picked], bool)
        inside, axes = self.member(there, tuple(self.picked))
        sizes: dict[Hashable, int] = dict.fromkeys(self.axes, 1)
        inside = named_axes.arrange(inside, axes, self.axes, sizes)

        def call(values: jax.Array, inside: jax.Array) -> jax.Array:
            return jnp.where(inside, values, jnp.asarray(fill, values.dtype))

        fill = math.nan if fill is None else fill
        step = Step(call, ("fill", repr(fill)), gathered.shape, gathered.dtype)
        return gathered.then(step, inside)

    def member(self, array: jax.Array, names: tuple[Axis, ...]) -> tuple[jax.Array, Sequence[Axis]]:
        """Gather a factor along those of the indexed axes that it has: `[*ids, *offset]`."""
        # where: dimension of the view -> dimension of the factor
        where = {self.view.axes.index(n): p for p, n in enumerate(names) if n in self.view.axes}
        columns = {i: column for i, column in self.columns.items() if i in where}
        if not columns:
            return array, names
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return self._keys(array, names, columns)
        # The same gather takes the row's slot out of a stack: no row gets a copy of its table.
        slots = [p for p, name in enumerate(names) if name == SLOT]
        # slice sizes and names per dimension of the factor, as the view's where it has them
        sizes, kept = list(array.shape), list(names)
        for i, p in where.items():
            sizes[p] = self._sizes[i]
            kept[p] = self.offset_axes.get(i, names[p])
        # offset: what is left once the collapsed and the paired dimensions are gone
        batching = {i: j for i, j in self._batching.items() if i in where}
        collapsed = tuple(where[i] for i in self._collapsed if i in where)
        collapsed = (*collapsed, *slots)
        sizes = [1 if p in slots else size for p, size in enumerate(sizes)]
        gone = {*collapsed, *(where[i] for i in batching)}
        offset = [name for p, name in enumerate(kept) if p not in gone]
        # JAX wants pairs in the order of the operand, which may not be the factor's.
        paired = sorted((where[i], j) for i, j in batching.items())
        n_ids = len(self.id_axes)
        # Ids that are unique or sorted as rows of all columns need not be so in some of them.
        same = columns == self.columns and batching == self._batching and not slots
        taken = lax.gather(
            array,
            self._ids(list(columns.values()), len(slots)),
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(n_ids, n_ids + len(offset))),
                collapsed_slice_dims=tuple(sorted(collapsed)),
                start_index_map=(*slots, *(where[i] for i in columns)),
                operand_batching_dims=tuple(at for at, _ in paired),
                start_indices_batching_dims=tuple(j for _, j in paired),
            ),
            tuple(sizes),
            unique_indices=same and self.params["unique_indices"],
            indices_are_sorted=same and self.params["indices_are_sorted"],
            mode=self.params["mode"],
            fill_value=0,
        )
        return taken, [*self.id_axes, *offset]

    def _ids(self, columns: Sequence[int], slots: int) -> jax.Array:
        """Return the indices with these columns only, behind `slots` of the row's slot."""
        if slots and self.view.row is not None:
            ids = self._ids(columns, 0)
            dtype = jnp.promote_types(ids.dtype, jnp.int32)
            slot = jnp.maximum(self.view.row.slot, 0).astype(dtype)
            if self.rows is not None:
                slot = jnp.expand_dims(slot, [i for i in range(ids.ndim) if i != self.rows.axis])
            column = jnp.broadcast_to(slot, (*ids.shape[:-1], slots))
            return jnp.concatenate([column, ids.astype(dtype)], -1)
        if list(columns) == list(range(self.indices.shape[-1])):
            return self.indices
        return jnp.stack([self.indices[..., column] for column in columns], -1)

    def _keys(
        self, keys: jax.Array, names: tuple[Axis, ...], columns: dict[int, int]
    ) -> tuple[jax.Array, Sequence[Axis]]:
        """Return the dropout key of the first weight picked from a stack; it serves them all."""
        first = self.indices.reshape(-1, self.indices.shape[-1])[0]
        for i, column in columns.items():
            at = names.index(self.view.axes[i])
            keys = lax.dynamic_index_in_dim(keys, first[column], at, keepdims=False)
            names = names[:at] + names[at + 1 :]
        return keys, names

    @property
    def _numbers(self) -> Any:
        return self.params["dimension_numbers"]

    @property
    def _sizes(self) -> Sequence[int]:
        return self.params["slice_sizes"]

    @property
    def _collapsed(self) -> Sequence[int]:
        return self._numbers.collapsed_slice_dims

    @property
    def _fills(self) -> bool:
        return self.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP

    @functools.cached_property
    def _batching(self) -> dict[int, int]:
        """Pairs that are batch axes of the gather: dimension of the view -> that of the indices."""
        numbers = self._numbers
        pairs = (numbers.operand_batching_dims, numbers.start_indices_batching_dims)
        return dict(zip(*pairs, strict=True))

    @property
    def _list_length(self) -> int | None:
        """The length of the ids, if they are one list that picks from one axis; else None."""
        paired = self._batching.values()
        counts = [n for j, n in enumerate(self.indices.shape[:-1]) if j not in paired]
        return counts[0] if len(counts) == len(self.picked) == len(self.columns) == 1 else None

    def _takes_all(self, i: int) -> bool:
        """Return whether a slice is as long as this dimension of the view."""
        return self._sizes[i] == self.view.shape[i]


def densify_rows(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Return a product's operands; rows looked up on the left are materialized if that is cheaper.

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
    # r multiply-adds per entry of the rows, against r per entry of x and r per entry of the product
    if math.prod(rows.shape) > math.prod(x.shape) + math.prod(eqn.outvars[0].aval.shape):
        return args
    return to_dense(rows), x
