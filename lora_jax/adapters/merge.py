"""`merge` and `unmerge`: add adapters to the base weights, and subtract them again."""

import dataclasses
import enum
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.split import join, split
from lora_jax.core.algebra import dense
from lora_jax.core.dtypes import accumulator, round_to
from lora_jax.core.errors import ConfigError, MergeError, StructureError
from lora_jax.core.host_memory import in_memory_of, on_device
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import (
    Adapted,
    LoraWeight,
    TrainedLeaf,
    TrainedRows,
    require_whole,
)


def merge(
    params: Any, dtype: Any = None, *, donate: bool = False, return_error: bool = False
) -> Any:
    """Return an ordinary parameter tree, with `W + scale · A · B` in place of each `LoraWeight`.

    The sum is computed in float32 (float64 if a factor is) and rounded once, by one compiled
    function per leaf that goes through a stack of layers one layer at a time. The base is not
    changed.

    Args:
      params: a joined tree.
      dtype: dtype of the merged leaves; None keeps the dtype of each base leaf.
      donate: let each merged leaf take the memory of its base leaf, which is deleted.
      return_error: also return how much of the update is lost to rounding.

    Returns:
      The merged tree. With `return_error` also `{path: error}`, where error compares the update
      that was applied with the exact one: ‖applied − ΔW‖/‖ΔW‖ as a float. It is 0 if the merge is
      exact or the update is zero, and near 1 if the dtype is too coarse for the update.

    Raises:
      MergeError: an A, B, scale, magnitude or trained value contains NaN or infinity. Nothing has
        been donated then. Not checked under tracing.
      StructureError: the adapters have no base or do not fit it, or are shapes without values.
      ConfigError: `dtype` is not a floating dtype.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.array([[2.0, 4.0]]), jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
    >>> merge(lora_jax.LoraWeight(w, a, b, jnp.float32(1.0), layout=lora_jax.Layout("io")))
    Array([[4., 8.]], dtype=float32)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"merge: dtype must be a floating dtype, got {jnp.dtype(dtype)}")
    nodes = adapted_nodes(params)
    for path, node in nodes.items():
        require_whole(path, node)
    check_finite(nodes)
    errors: dict[str, Any] = {}
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> jax.Array:
        target = jnp.dtype(dtype or node.w.dtype)
        base, rest = split(node)
        if return_error:
            errors[path] = _rounding_error(base, rest, target, _choose_form(base, rest))
        return _combine(base, rest, target, donate and owners[id(base)] == 1)

    merged = map_adapted(one, params)
    if not return_error:
        return merged
    return merged, {path: _as_float(error) for path, error in errors.items()}


def merge_layer(node: Adapted, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return one merged leaf, and the squared norms of what rounding lost and of the update.

    The leaf is what `merge` makes of it, to the bit; `merge`'s error is the root of the quotient,
    summed over the layers of a stack.
    """
    base, rest = split(node)
    merged = _sum_kept(base, rest, dtype=jnp.dtype(dtype), form=LoopForm.WHOLE)
    return (merged, *_norms_of(node, jnp.dtype(dtype)))


def take_layer(node: Adapted, w: Any, at: Sequence[Any]) -> Adapted:
    """Return the part of a stacked node for one layer, its stacked axes of size 1.

    Args:
      node: adapters of a whole stack.
      w: the layer of the base, its stacked axes of size 1.
      at: the layer's number for each stacked axis of the leaf, `slice(None)` for other axes.
    """
    cut = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in at)
    if isinstance(node, TrainedLeaf):
        scale = node.scale
        if jnp.ndim(scale):  # sizes of stacked layers followed by ones
            sizes = zip(cut, scale.shape, strict=True)
            scale = scale[tuple(part if size > 1 else slice(None) for part, size in sizes)]
        return dataclasses.replace(node, w=w, value=node.value[cut], scale=scale)
    batch = tuple(cut[i] for i in node.layout.positions("b"))
    if isinstance(node, TrainedRows):
        return dataclasses.replace(node, w=w, value=node.value[batch])
    magnitude = None if node.magnitude is None else node.magnitude[batch]
    parts = {"a": node.a[batch], "b": node.b[batch], "scale": node.scale[batch]}
    return dataclasses.replace(node, w=w, magnitude=magnitude, **parts)


def unmerge(merged: Any, adapters: Any, *, donate: bool = False) -> Any:
    """Return the joined tree that was merged: `W = merged − scale · A · B`, with its adapters.

    The difference is computed in float32 and rounded once, so a base in a coarse dtype comes back
    up to rounding. If it must come back to the bit, keep the base (see `split`). A fully trained
    leaf keeps its trained value as its base too, because the value that it replaced is not known.

    Args:
      merged: a tree as `merge` returns it.
      adapters: the overlay that was merged.
      donate: let each base leaf take the memory of its merged leaf, which is deleted.

    Raises:
      StructureError: the adapters do not fit; all differences are listed.
      MergeError: an adapter contains NaN or infinity, or has a magnitude (DoRA), because the merged
        weight does not store the norms of `W + scale · A · B`.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.array([[2.0, 4.0]]), jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
    >>> params = lora_jax.LoraWeight(w, a, b, jnp.float32(1.0), layout=lora_jax.Layout("io"))
    >>> _, adapters = lora_jax.split(params)
    >>> unmerge(merge(params), adapters).w
    Array([[2., 4.]], dtype=float32)
    """
    joined = join(merged, adapters)
    nodes = adapted_nodes(joined)
    with_magnitude = [
        path for path, node in nodes.items() if getattr(node, "magnitude", None) is not None
    ]
    if with_magnitude:
        raise MergeError(
            f"unmerge: cannot recover the base weight of {', '.join(with_magnitude)}: with DoRA "
            "the column norms are not stored in the merged weight. Keep the base instead: "
            "base, adapters = split(params), later join(base, adapters)"
        )
    check_finite(nodes)
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        base, rest = split(node)
        negative = dataclasses.replace(rest, scale=-rest.scale)
        donated = donate and owners[id(base)] == 1
        return dataclasses.replace(node, w=_combine(base, negative, base.dtype, donated))

    return map_adapted(one, joined)


class LoopForm(enum.Enum):
    """How the sum goes through a leaf."""

    #: All of it at once.
    WHOLE = enum.auto()
    #: One layer of a stack after the other, so that the temporary memory is one layer's.
    LAYERS = enum.auto()
    #: As LAYERS, with the stack's bits as integers: jaxlib 0.10 on a CPU converts a whole array of
    #: 16-bit floats to write one slice of it, but not one of integers. Remove this form when
    #: LAYERS takes no more temporary memory on a bfloat16 stack (`memory_analysis` tells).
    BITS = enum.auto()


def _choose_form(base: Any, rest: Adapted) -> LoopForm:
    """Return how to go through a leaf: what it is, where it lies, and whether it is traced."""
    if not isinstance(rest, LoraWeight) or math.prod(rest.scale.shape) == 1:
        return LoopForm.WHOLE
    stacked = rest.layout.positions("b")
    if isinstance(base, jax.Array) and any(jax.typeof(base).sharding.spec[i] for i in stacked):
        return LoopForm.WHOLE
    if not isinstance(base, jax.Array) or any(map(_is_traced, jax.tree.leaves((base, rest)))):
        return LoopForm.LAYERS  # integers have no gradient
    held = base.sharding.shard_shape(base.shape)
    if any(held[i] != base.shape[i] for i in stacked):
        return LoopForm.WHOLE  # the layers lie on several devices, which work at the same time
    on_cpu = all(device.platform == "cpu" for device in base.devices())
    return LoopForm.BITS if on_cpu and base.dtype.itemsize < 4 else LoopForm.LAYERS


def _sum(base: jax.Array, rest: Adapted, *, dtype: Any, form: LoopForm) -> jax.Array:
    """Return `W + scale · A · B` in `dtype`."""
    if form is LoopForm.WHOLE:
        return in_memory_of(dense(dataclasses.replace(rest, w=base), dtype), base)
    stack = _to_carry(on_device(base), form)
    in_place = base.dtype == dtype  # then the sum takes the place of the layer that it read

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        layer, start = _layer(out if in_place else stack, base.dtype, rest, i)
        return lax.dynamic_update_slice(out, _to_carry(dense(layer, dtype), form), start)

    start = stack if in_place else _to_carry(jnp.zeros(base.shape, dtype), form)
    total = _bitcast(lax.fori_loop(0, math.prod(rest.scale.shape), one, start), dtype)
    return in_memory_of(total, base)


def _to_carry(x: jax.Array, form: LoopForm) -> jax.Array:
    """Return `x` as the loop over its layers carries it."""
    return _bitcast(x, f"uint{8 * x.dtype.itemsize}") if form is LoopForm.BITS else x


def _bitcast(x: jax.Array, dtype: Any) -> jax.Array:
    """Return the same bits as `dtype`; if `x` has it already, `x` itself, with its gradients."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _layer(
    stack: jax.Array, dtype: Any, rest: Any, i: jax.Array
) -> tuple[LoraWeight, tuple[Any, ...]]:
    """Return the i-th layer of a stack, its batch axes of size 1, and where it starts in it."""
    index: list[jax.Array] = []  # one number per batch axis
    for size in reversed(rest.scale.shape):
        i, last = lax.div(i, size), lax.rem(i, size)
        index.insert(0, last)
    where = dict(zip(rest.layout.positions("b"), index, strict=True))
    start = tuple(where.get(axis, 0) for axis in range(stack.ndim))
    sizes = tuple(1 if axis in where else size for axis, size in enumerate(stack.shape))

    def part(x: jax.Array) -> jax.Array:  # of a factor, whose batch axes come first
        inner = x.shape[len(index) :]
        return lax.dynamic_slice(x, (*index, *(0 for _ in inner)), (*(1 for _ in index), *inner))

    w = _bitcast(lax.dynamic_slice(stack, start, sizes), dtype)
    return dataclasses.replace(jax.tree.map(part, rest), w=w), start


_STATIC = ("dtype", "form")
_sum_kept = jax.jit(_sum, static_argnames=_STATIC)
_sum_donated = jax.jit(_sum, static_argnames=_STATIC, donate_argnums=0)


def _owners(nodes: dict[str, Adapted]) -> Counter[int]:
    """Count the places of each base array: one that stands in two places cannot be donated."""
    return Counter(id(node.w) for node in nodes.values())


def _combine(base: jax.Array, rest: Adapted, dtype: Any, donate: bool) -> jax.Array:
    # Only a result of the same dtype can take the memory of the base.
    combine = _sum_donated if donate and dtype == base.dtype else _sum_kept
    return combine(base, rest, dtype=jnp.dtype(dtype), form=_choose_form(base, rest))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _rounding_error(base: jax.Array, rest: Adapted, dtype: Any, form: LoopForm) -> jax.Array:
    """Return ‖lost‖/‖update‖, with the squares summed layer by layer like the update itself."""
    base = on_device(base)
    layers = 1 if form is LoopForm.WHOLE else math.prod(rest.scale.shape)

    def one(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        node = dataclasses.replace(rest, w=base)
        if form is not LoopForm.WHOLE:
            node, _ = _layer(_to_carry(base, form), base.dtype, rest, i)
        lost, update = _squared_norms(node, dtype)
        return sums[0] + lost, sums[1] + update

    zero = jnp.zeros((), accumulator(base.dtype, dtype))
    lost, update = lax.fori_loop(0, layers, one, (zero, zero))
    return jnp.where(update > 0, jnp.sqrt(lost / jnp.where(update > 0, update, 1)), 0)


def _squared_norms(node: Adapted, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return the squared norms of what rounding to `dtype` loses, and of the leaf's update."""
    wide = accumulator(node.w.dtype, dtype)
    exact = dense(node, wide)
    lost = round_to(exact, dtype) - exact
    update = exact - node.w.astype(wide)
    return jnp.sum(lost * lost), jnp.sum(update * update)


_norms_of = jax.jit(_squared_norms, static_argnums=1)


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _as_float(x: jax.Array) -> Any:
    return x if _is_traced(x) else float(x)


def check_finite(nodes: dict[str, Adapted]) -> None:
    """Raise if adapters contain NaN or infinity, or have shapes but no values.

    Raises:
      MergeError, StructureError: as in `merge`; all are named.
    """
    parts = {
        f"{path}: {field.name}": getattr(node, field.name)
        for path, node in nodes.items()
        for field in dataclasses.fields(node)
        if field.name in ("a", "b", "scale", "magnitude", "value")
        and getattr(node, field.name) is not None
    }
    abstract = [name for name, x in parts.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise StructureError("merge: these have no values yet, only shapes: " + ", ".join(abstract))
    finite = _all_finite(list(parts.values()))
    if any(map(_is_traced, finite)):  # also of constants, if the caller is being traced
        return
    finite = jax.device_get(finite)
    wrong = [name for name, ok in zip(parts, finite, strict=True) if not ok]
    if wrong:
        raise MergeError(
            "these contain NaN or infinity, so merging would destroy the base weights: "
            + ", ".join(wrong)
        )


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in arrays]
