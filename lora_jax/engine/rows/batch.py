"""A batch whose rows use different adapters: where its rows are, and how they are computed."""

# Measured: one decoding step of SmolLM2 with a cache, unrolled, 8 rows of 8 adapters of rank 16 on
# q and v, two CPU cores, time over that of 8 rows of one adapter: 3.1 to 4.1 by a vmap over rows,
# the same without any gather, so neither A[id] nor small products matter: XLA transposes and copies
# keys and values (170 MB of temporary memory where one adapter takes 4), because mapped attention
# has two axes of batch, and dynamic_update_slice becomes a scatter. By hand, the program as it is
# for the whole batch and only the branch with its axis of rows, x[rows, 1, in] · A[ids][rows, in,
# rank] · B[ids]: 1.02, or 1.00 with A and B selected before; as products and sums 1.08 to 1.19; as
# a masked concatenation 1.00 to 1.12. So the program stays as it is wherever a weight meets an
# activation with rows. A vmap is left for what has no such axis: a weight that meets an activation
# without rows, a product of two weights, convolutions, ragged products; and for loops that go on
# until all rows are done, in which a row would take more steps than alone.

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError, LoraError
from lora_jax.core.foreign import shown_value
from lora_jax.core.paths import flatten_with_key_paths, path_str
from lora_jax.core.sharding.meshes import gathered, has_explicit_mesh
from lora_jax.core.slots import check_ids
from lora_jax.core.weights import LoraWeight, is_adapted, is_weight
from lora_jax.engine.lazy_weight import Row
from lora_jax.engine.program import Argument, Program, is_dynamic
from lora_jax.engine.rows.equations import Wide
from lora_jax.engine.rows.mixing import facts_of, prime_for
from lora_jax.engine.rows.places import Places, transferred
from lora_jax.engine.rows.slots import NoPlaceForRows

#: `run(row, args, kwargs, places_in)`: what the function returns for one row, or for all;
#: `places_in` tells where its program has the rows.
Run = Callable[[Row, Any, Mapping[str, Any], Callable[[Any], Places]], Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of one call, and which axis of each leaf is the axis of rows."""

    args: Any
    kwargs: Mapping[str, Any]
    ids: jax.Array  # [rows]
    axes: Sequence[int | None]  # per leaf of (args, kwargs)
    in_order: bool  # it is known that row n uses slot n, and nothing uses others

    @classmethod
    def of(
        cls, args: Any, kwargs: Mapping[str, Any], adapted: set[Argument], ids: Any, row_axes: Any
    ) -> "Batch":
        """Return the batch of a call; axes that `row_axes` does not name are inferred from `ids`.

        Raises:
          ConfigError: `ids` have no single axis of rows, or an array does not have as many.
        """
        slots = _slots((args, kwargs))
        known = not isinstance(ids, jax.core.Tracer)
        in_order = known and np.array_equal(np.ravel(ids), np.arange(slots))
        ids = gathered(check_ids("adapters_of", ids, slots))
        long = [i for i, size in enumerate(ids.shape) if size != 1] or [ids.ndim - 1]
        if ids.ndim == 0 or len(long) > 1 or not ids.size:
            raise ConfigError(
                f"adapters_of: pass one id per row of the batch, [rows], got shape {ids.shape}"
            )
        rows, axis = ids.size, long[0]
        named = _named_axes(args, kwargs, row_axes)
        axes: list[int | None] = []
        for number, (path, leaf) in enumerate(_leaves((args, kwargs))):
            if number in named:
                has_rows = hasattr(leaf, "shape") and path[:2] not in adapted
                axes.append(_checked(path, leaf, named[number], rows, has_rows))
            elif path[:2] in adapted or not hasattr(leaf, "shape"):
                axes.append(None)
            else:
                has_rows = len(leaf.shape) > axis and leaf.shape[axis] == rows
                axes.append(axis if has_rows else None)
        if all(x is None for x in axes):
            raise ConfigError(
                f"adapters_of: no array among the arguments has {rows} rows along axis {axis}; "
                "there is one id per row. Say where the rows are by row_axes="
            )
        return cls(args, kwargs, ids.reshape(-1), axes, in_order)

    def run(self, fn: Callable, run: Run, enter: Callable) -> Any:
        """Return what `fn` returns, each row with its own adapter.

        The program stays that of the whole batch, and only A and B have an axis of rows. Where that
        is not possible every row is computed as a batch of one row, under `jax.vmap`.

        Args:
          fn: the function.
          run: interprets it for some rows, the places of whose axes it gets for its program.
          enter: gives what stands in the program of `fn` for a leaf, without adapters.

        Raises:
          ConfigError: the function mixes rows, or returns them where they cannot be told.
        """
        traced = self._traced(fn, enter)
        nodes = [x for _, x in self._pairs if is_adapted(x) and x.slots is not None]
        if all(isinstance(x, LoraWeight) for x in nodes) and not traced.waits:
            row = Row(self.ids, jnp.arange(len(self.ids), dtype=jnp.int32), self.in_order)
            with contextlib.suppress(NoPlaceForRows):
                return run(row, self.args, self.kwargs, traced.places_in)
        if traced.drawn:
            raise ConfigError(f"adapters_of: {traced.drawn}")
        return self._run_mapped(run, traced.out_axes)

    def _run_mapped(self, run: Run, out_axes: Sequence[int | None]) -> Any:
        fixed: list[Any] = []  # what the function returns, its arrays left out

        def one(row: Row, leaves: Sequence[Any]) -> list[Any]:
            pairs = zip(self._pairs, self.axes, leaves, strict=True)
            args, kwargs = self._rebuild([_of_one_row(leaf, *x) for (_, leaf), *x in pairs])
            outs, treedef = jax.tree.flatten(run(row, args, kwargs, lambda _: {}))
            fixed[:] = [treedef, [None if isinstance(x, jax.Array) else x for x in outs]]
            arrays = [x for x in outs if isinstance(x, jax.Array)]
            return [
                x if axis is None else jnp.squeeze(x, axis)
                for x, axis in zip(arrays, out_axes, strict=True)
            ]

        pairs = [
            self._mapped(leaf, axis) for (_, leaf), axis in zip(self._pairs, self.axes, strict=True)
        ]
        leaves, in_axes = (list(x) for x in zip(*pairs, strict=True))
        row = Row(self.ids, jnp.arange(len(self.ids), dtype=jnp.int32))
        try:
            outs = jax.vmap(one, (0, in_axes), out_axes)(row, leaves)
        except (LoraError, Warning):
            raise
        except Exception as error:
            raise ConfigError(
                "adapters_of: every row is computed as a batch of one row, under jax.vmap, and "
                f"there the function fails with {type(error).__name__}: {error}"
            ) from error
        arrays, (treedef, others) = iter(outs), fixed
        return jax.tree.unflatten(treedef, [next(arrays) if x is None else x for x in others])

    def _mapped(self, leaf: Any, axis: int | None) -> tuple[Any, int | None]:
        """Return what of a leaf differs from row to row, and along which axis; None for nothing."""
        if self.in_order and is_adapted(leaf) and leaf.slots is not None:
            return dataclasses.replace(leaf, w=None), 0
        return (None, None) if axis is None else (leaf, axis)

    @property
    def _pairs(self) -> list[tuple[Any, Any]]:
        return _leaves((self.args, self.kwargs))

    def _rebuild(self, leaves: Sequence[Any]) -> Any:
        treedef = jax.tree.structure((self.args, self.kwargs), is_leaf=is_weight)
        return jax.tree.unflatten(treedef, leaves)

    def _traced(self, fn: Callable, enter: Callable) -> "_Traced":
        """Return what a trace with many rows tells."""
        sizes = [n for _, leaf in self._pairs for n in getattr(leaf, "shape", ())]
        wide = Wide(prime_for(sizes), len(self.ids))
        try:
            return self._traced_with(fn, enter, wide)
        except ConfigError:
            # The prime may divide a size that the program itself makes.
            other = dataclasses.replace(wide, prime=prime_for(sizes, after=wide.prime))
            return self._traced_with(fn, enter, other)

    def _traced_with(self, fn: Callable, enter: Callable, wide: Wide) -> "_Traced":
        program, adapted = self._trace(fn, enter, wide)
        facts = facts_of(program.jaxpr, wide, adapted)
        found = []
        for v, fact in zip(program.jaxpr.outvars, facts.outputs, strict=True):
            if fact.mixed:
                raise ConfigError(f"adapters_of: {fact.mixed}")
            axis = _row_axis(v.aval, wide)
            if axis is None and fact.adapted:
                raise ConfigError(
                    f"adapters_of: an output {v.aval.shape} has no axis of rows and depends on the "
                    "adapters, which differ from row to row. Return it for each row, or leave it "
                    "out"
                )
            found.append(axis)
        drawn = next((x.drawn for x in facts.outputs if x.drawn), None)
        return _Traced(program.jaxpr, facts.places, found, drawn, facts.waits)

    def _trace(self, fn: Callable, enter: Callable, wide: Wide) -> tuple[Program, list[bool]]:
        """Return the program for many rows, and which of its inputs have adapters."""
        leaves = [
            leaf if axis is None else _widened(leaf, axis, wide.total)
            for (_, leaf), axis in zip(self._pairs, self.axes, strict=True)
        ]
        args, kwargs = self._rebuild(leaves)
        adapted: list[bool] = []

        def noted(argument: Argument, path: str, leaf: Any) -> Any:
            entered = enter(argument, path, leaf)
            if is_dynamic(entered):
                adapted.append(is_adapted(leaf) and leaf.slots is not None)
            return entered

        try:
            return Program.of(fn, args, kwargs, noted), adapted
        except Exception as error:
            raise ConfigError(
                f"adapters_of: the function does not take another number of rows ({wide.total} in "
                f"place of {wide.rows}), which says where its rows are. Pass every array that has "
                "rows as an argument, and name one that has none, though its size is the same, by "
                f"row_axes, with None. It fails with {type(error).__name__}: {error}"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Traced:
    """What a trace with many rows tells."""

    jaxpr: Any
    places: Places
    out_axes: Sequence[int | None]  # of each array returned: the axis of rows, None without
    drawn: str | None  # what draws random numbers of all rows from one key
    waits: bool  # whether a loop goes on until all rows are done

    def places_in(self, jaxpr: Any) -> Places:
        """Return where the rows are in the program of the batch itself."""
        return transferred(self.jaxpr, jaxpr, self.places)


def _of_one_row(leaf: Any, axis: int | None, own: Any) -> Any:
    """Return a leaf as one row has it, from what of it is the row's own."""
    if own is None:
        return leaf
    if axis is None:  # of an adapted weight, all but the base
        return dataclasses.replace(own, w=leaf.w)
    return jnp.expand_dims(own, axis)


def _widened(leaf: Any, axis: int, rows: int) -> jax.ShapeDtypeStruct:
    shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
    sharding = jax.typeof(leaf).sharding if has_explicit_mesh(leaf) else None
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _row_axis(aval: Any, wide: Wide) -> int | None:
    axes = [i for i, size in enumerate(aval.shape) if size and size % wide.prime == 0]
    if not axes:
        return None
    if len(axes) > 1 or aval.shape[axes[0]] != wide.total:
        shape = tuple("rows" if i in axes else n for i, n in enumerate(aval.shape))
        raise ConfigError(
            f"adapters_of: an output {shape} has the rows merged with another axis. Return the "
            "rows as a separate axis"
        )
    return axes[0]


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return flatten_with_key_paths(tree, is_leaf=is_adapted)


def _slots(arguments: Any) -> int:
    """Return how many adapters the stacks among the arguments have."""
    nodes = [x for _, x in _leaves(arguments) if is_adapted(x)]
    counts = {node.slots for node in nodes} - {None}
    if len(counts) != 1:
        raise ConfigError(
            "adapters_of: the parameters contain no stack of adapters; pass join(base, "
            "stack([adapters, ...]))"
        )
    return counts.pop()


def _named_axes(args: Any, kwargs: Mapping[str, Any], row_axes: Any) -> dict[int, Any]:
    """Return the axes that `row_axes` gives, by the number of the leaf among all."""
    if not isinstance(row_axes, Mapping | None):
        raise ConfigError(
            "row_axes: pass a dict from the position or name of an argument to an axis, such as "
            f'{{"cache": 1}}, got {shown_value(row_axes)}'
        )
    given = dict(row_axes or {})
    named: dict[int, Any] = {}
    number = 0
    keys = [*range(len(args)), *kwargs]
    for key, argument in zip(keys, [*args, *kwargs.values()], strict=True):
        count = len(_leaves(argument))
        if key in given:
            treedef = jax.tree.structure(argument, is_leaf=is_weight)
            leaves = jax.tree.unflatten(treedef, range(count))
            try:
                axes = jax.tree.broadcast(given.pop(key), leaves, is_leaf=_is_none)
            except ValueError as error:
                raise ConfigError(
                    f"row_axes: the tree for argument {key!r} does not begin the argument's tree: "
                    f"{error}"
                ) from error
            named |= dict(enumerate(jax.tree.leaves(axes, is_leaf=_is_none), number))
        number += count
    if given:
        names = ", ".join(sorted(map(repr, given)))
        raise ConfigError(f"row_axes: the call has no argument {names}; it has {keys}")
    return named


def _is_none(x: Any) -> bool:
    return x is None


def _checked(path: Any, leaf: Any, axis: Any, rows: int, has_rows: bool) -> int | None:
    """Return the axis of a leaf that `row_axes` names, or raise if it has no rows there."""
    if axis is None:
        return None
    where = path_str(path[1:])  # the argument's position or name, and the place in it
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise ConfigError(
            f"row_axes: {where}: an axis is an integer or None, got {shown_value(axis)}"
        )
    if not has_rows:
        raise ConfigError(f"row_axes: {where} has no rows; leave it out, or pass None")
    if not -len(leaf.shape) <= axis < len(leaf.shape) or leaf.shape[axis] != rows:
        raise ConfigError(f"row_axes: {where} {leaf.shape} has no axis {axis} of {rows} rows")
    return axis % len(leaf.shape)
