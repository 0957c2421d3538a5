"""A function of a batch as a function of its rows: which axes are rows, before and after."""

# Measured: one decoding step of SmolLM2 with a cache, unrolled, 8 rows of 8 adapters of rank 16 on
# q and v, two CPU cores, time over that of 8 rows of one adapter: 3.1 to 4.1 by the vmap over rows
# here, the same without any gather, so neither A[id] nor small products matter: XLA transposes and
# copies keys and values (170 MB of temporary memory where one adapter takes 4), because mapped
# attention has two axes of batch, and dynamic_update_slice becomes a scatter. By hand, the program
# as it is for the whole batch and only the branch with its batch axis, x[rows, 1, in] ·
# A[ids][rows, in, rank] · B[ids]: 1.02, or 1.00 with A and B selected before; as products and sums
# 1.08 to 1.19; as a masked concatenation 1.00 to 1.12. So the rows should be an axis of the branch
# alone, under a name that A and B have and W does not have, like a batch axis of the weight; the
# axis of x follows from the program with a prime number of rows below. A vmap is left for what has
# no such axis: a weight that meets an activation without rows, a product of two weights.

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.paths import flatten_with_key_paths, path_str
from lora_jax.core.slots import check_ids
from lora_jax.core.weights import is_adapted, is_weight
from lora_jax.engine.lazy_weight import Row
from lora_jax.engine.program import Argument, Program
from lora_jax.engine.rows.mixing import mixed_outputs, prime_for

#: `run(row, args, kwargs)`: what the function returns for a batch of one row.
Run = Callable[[Row, Any, Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of one call, and which axis of each leaf is the axis of rows."""

    args: Any
    kwargs: Mapping[str, Any]
    ids: jax.Array  # [rows]
    axes: Sequence[int | None]  # per leaf of (args, kwargs)

    @classmethod
    def of(
        cls, args: Any, kwargs: Mapping[str, Any], adapted: set[Argument], ids: Any, row_axes: Any
    ) -> "Batch":
        """Return the batch of a call; axes that `row_axes` does not name are inferred from `ids`.

        Raises:
          ConfigError: `ids` have no single axis of rows, or an array does not have as many.
        """
        slots = _slots((args, kwargs))
        ids = check_ids("adapters_of", ids, slots)
        long = [i for i, size in enumerate(ids.shape) if size != 1] or [ids.ndim - 1]
        if ids.ndim == 0 or len(long) > 1:
            raise ConfigError(
                f"adapters_of: pass one id per row of the batch, [rows], got shape {ids.shape}"
            )
        rows, axis = ids.size, long[0]
        named = _named_axes(args, kwargs, row_axes)
        axes: list[int | None] = []
        for number, (path, leaf) in enumerate(_leaves((args, kwargs))):
            if path[:2] in adapted or not hasattr(leaf, "shape"):
                axes.append(None)
            elif number in named:
                axes.append(_checked(path, leaf, named[number], rows))
            else:
                has_rows = len(leaf.shape) > axis and leaf.shape[axis] == rows
                axes.append(axis if has_rows else None)
        if all(x is None for x in axes):
            raise ConfigError(
                f"adapters_of: no array among the arguments has {rows} rows along axis {axis}; "
                "there is one id per row. Say where the rows are by row_axes="
            )
        return cls(args, kwargs, ids.reshape(-1), axes)

    def run(self, fn: Callable, run_row: Run, enter: Callable) -> Any:
        """Return what `fn` returns, each row computed by `run_row`.

        `enter` gives what stands in the program of `fn` for a leaf, without adapters.

        Raises:
          ConfigError: the function mixes rows, or returns them where they cannot be told.
        """
        rows = len(self.ids)
        out_axes = self._out_axes(fn, enter)
        treedefs: list[Any] = []

        def one(row: Row, leaves: Sequence[Any]) -> list[Any]:
            values = iter(leaves)
            given = [
                leaf if axis is None else jnp.expand_dims(next(values), axis)
                for (_, leaf), axis in zip(self._pairs, self.axes, strict=True)
            ]
            outs, treedef = jax.tree.flatten(run_row(row, *self._rebuild(given)))
            treedefs[:] = [treedef]
            return [
                x if axis is None else jnp.squeeze(x, axis)
                for x, axis in zip(outs, out_axes, strict=True)
            ]

        mapped = [
            leaf for (_, leaf), axis in zip(self._pairs, self.axes, strict=True) if axis is not None
        ]
        in_axes = [axis for axis in self.axes if axis is not None]
        row = Row(self.ids, jnp.arange(rows, dtype=jnp.int32))
        outs = jax.vmap(one, ((Row(0, 0)), in_axes), out_axes)(row, mapped)
        return jax.tree.unflatten(treedefs[0], outs)

    @property
    def _pairs(self) -> list[tuple[Any, Any]]:
        return _leaves((self.args, self.kwargs))

    def _rebuild(self, leaves: Sequence[Any]) -> Any:
        treedef = jax.tree.structure((self.args, self.kwargs), is_leaf=is_weight)
        return jax.tree.unflatten(treedef, leaves)

    def _out_axes(self, fn: Callable, enter: Callable) -> list[int | None]:
        """Return which axis of each output is the axis of rows, None of one without rows."""
        rows = len(self.ids)
        sizes = [n for _, leaf in self._pairs for n in getattr(leaf, "shape", ())]
        prime = prime_for(sizes)
        wide = []
        for (_, leaf), axis in zip(self._pairs, self.axes, strict=True):
            if axis is not None:
                shape = (*leaf.shape[:axis], prime * rows, *leaf.shape[axis + 1 :])
                leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
            wide.append(leaf)
        args, kwargs = self._rebuild(wide)
        program = Program.of(fn, args, kwargs, enter)
        mixed = mixed_outputs(program.jaxpr, prime)
        found = []
        outs = [v.aval for v in program.jaxpr.outvars]
        for aval, where in zip(outs, mixed, strict=True):
            if where:
                raise ConfigError(
                    f"adapters_of: {where} mixes the rows of the batch, so a row's output depends "
                    "on the other rows' adapters. Compute what mixes them outside of the function, "
                    "or run each row for itself"
                )
            found.append(_row_axis(aval, prime, rows))
        flat = jax.tree.leaves(program.rebuild([_Out(axis) for axis in found]))
        return [x.axis if isinstance(x, _Out) else None for x in flat]


@dataclasses.dataclass(frozen=True)
class _Out:
    axis: int | None


def _row_axis(aval: Any, prime: int, rows: int) -> int | None:
    axes = [i for i, size in enumerate(aval.shape) if size and size % prime == 0]
    if not axes:
        return None
    if len(axes) > 1 or aval.shape[axes[0]] != prime * rows:
        shown = tuple("rows" if i in axes else n for i, n in enumerate(aval.shape))
        raise ConfigError(
            f"adapters_of: an output {shown} has the rows merged with another axis. Return the "
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


def _named_axes(args: Any, kwargs: Mapping[str, Any], row_axes: Any) -> dict[int, int | None]:
    """Return the axes that `row_axes` gives, by the number of the leaf among all."""
    given = dict(row_axes or {})
    named: dict[int, int | None] = {}
    number = 0
    keys = [*range(len(args)), *kwargs]
    for key, argument in zip(keys, [*args, *kwargs.values()], strict=True):
        count = len(_leaves(argument))
        if key in given:
            prefix = jax.tree.broadcast(
                given.pop(key),
                jax.tree.unflatten(jax.tree.structure(argument, is_leaf=is_weight), range(count)),
                is_leaf=lambda x: x is None,
            )
            named |= dict(enumerate(jax.tree.leaves(prefix, is_leaf=lambda x: x is None), number))
        number += count
    if given:
        raise ConfigError(f"row_axes: the call has no arguments {sorted(map(str, given))}")
    return named


def _checked(path: Any, leaf: Any, axis: int | None, rows: int) -> int | None:
    if axis is None:
        return None
    if not -len(leaf.shape) <= axis < len(leaf.shape) or leaf.shape[axis] != rows:
        raise ConfigError(
            f"row_axes: {path_str(path)} {leaf.shape} has no axis {axis} of {rows} rows"
        )
    return axis % len(leaf.shape)
