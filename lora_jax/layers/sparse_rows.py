"""Row-sparse training of an embedding: work only on the rows that a batch looks up."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.opened import opened_class
from lora_jax.core.errors import StructureError
from lora_jax.core.weights import LoraWeight, TrainedLeaf, is_adapted


def looked_up(ids: jax.Array) -> jax.Array:
    """Return the distinct ids, sorted, `[ids.size]`, padded with the largest integer.

    >>> import jax.numpy as jnp
    >>> looked_up(jnp.array([[7, 2], [7, 7]])).tolist()
    [2, 7, 2147483647, 2147483647]
    """
    return jnp.unique(ids, size=ids.size, fill_value=jnp.iinfo(ids.dtype).max)


def take_rows(tree: Any, at: jax.Array) -> Any:
    """Take the rows `at` of everything in `tree` that has one row per id.

    Use the rows in place of the whole table: `embedding.apply(rows, ids, at=at)` equals
    `embedding.apply(params, ids)`, and its gradient with respect to `rows` has the size of the
    batch, however large the vocabulary is. Take the rows of the optimizer's state too, make the
    step, and put both back with `put_rows`: that is PyTorch's `sparse=True` with `SparseAdam`. Rows
    that the batch does not look up keep their moments and get no weight decay.

    Args:
      tree: the parameters of the embedding alone, or the state of an elementwise optimizer (SGD,
        momentum, Adam) of them. For a `LoraWeight`, rows of W and A are taken, while B and scale
        stay whole. Scalars stay as they are. All else must be tables of the same length.
      at: sorted ids, as `looked_up` returns them; rows beyond the table are zero.

    Raises:
      StructureError: the tree contains arrays of several lengths, or a weight with a magnitude
        (DoRA), whose norms are over the whole table.

    >>> import jax.numpy as jnp
    >>> params, at = {"embedding": jnp.array([[1.0], [2.0], [3.0]])}, jnp.array([0, 2])
    >>> take_rows(params, at)["embedding"].tolist()
    [[1.0], [3.0]]
    """
    _check_lengths(tree)

    def take(x: Any) -> Any:
        if not _is_table(x):
            return x
        return jnp.take(x, at, axis=0, mode="fill", fill_value=0)

    return jax.tree.map(lambda node: _map_rows(take, node), tree, is_leaf=_is_node)


def put_rows(tree: Any, at: jax.Array, rows: Any) -> Any:
    """Put rows back at the ids `at` of `tree`; the inverse of `take_rows`.

    To write the rows in place, donate `tree` (`jax.jit(..., donate_argnums=...)`). The W of a
    `LoraWeight` is frozen and stays the same array; B is taken from `rows`.

    >>> import jax.numpy as jnp
    >>> params, at = {"embedding": jnp.array([[1.0], [2.0], [3.0]])}, jnp.array([0, 2])
    >>> put_rows(params, at, {"embedding": jnp.array([[10.0], [30.0]])})["embedding"].tolist()
    [[10.0], [2.0], [30.0]]
    """

    def put(x: Any, new: Any) -> Any:
        return x.at[at].set(new, mode="drop") if _is_table(x) else new

    def one(node: Any, new: Any) -> Any:
        if not _is_node(node):
            return put(node, new)
        trained = _trained_rows(node)
        table = put(_get(node, trained), _get(new, trained))
        return _replace(new, w=_get(node, "w"), **{trained: table})

    return jax.tree.map(one, tree, rows, is_leaf=_is_node)


def _map_rows(fn: Any, node: Any) -> Any:
    """Apply `fn` to an array, or to the arrays of an adapted node that have one row per id."""
    if not _is_node(node):
        return fn(node)
    fields = ("w", _trained_rows(node))
    return _replace(node, **{name: fn(_get(node, name)) for name in fields})


def _trained_rows(node: Any) -> str:
    """Return the name of the field that has one trained row per id."""
    kind = opened_class(node) or type(node)
    if kind is TrainedLeaf:
        return "value"
    if kind is LoraWeight and _get(node, "magnitude") is None:
        return "a"
    what = "a magnitude (DoRA)" if kind is LoraWeight else kind.__name__
    raise StructureError(f"take_rows: cannot take rows of a table with {what}")


def _is_node(x: Any) -> bool:
    """Return whether `x` is an adapted node, or its dictionary in the state of an optimizer."""
    return is_adapted(x) or opened_class(x) is not None


def _get(node: Any, name: str) -> Any:
    return node[name] if isinstance(node, dict) else getattr(node, name)


def _replace(node: Any, **fields: Any) -> Any:
    return {**node, **fields} if isinstance(node, dict) else dataclasses.replace(node, **fields)


def _is_table(x: Any) -> bool:
    """Return whether `x` is an array with rows; an optimizer may have no state for a leaf."""
    return isinstance(x, jax.Array) and x.ndim > 0


def _check_lengths(tree: Any) -> None:
    lengths = set()

    def note(x: Any) -> Any:
        if _is_table(x):
            lengths.add(x.shape[0])
        return x

    jax.tree.map(lambda node: _map_rows(note, node), tree, is_leaf=_is_node)
    if len(lengths) > 1:
        raise StructureError(
            f"take_rows: the tree contains arrays of {sorted(lengths)} rows. Pass the parameters "
            "of the embedding alone, and the state of an optimizer of these alone"
        )
