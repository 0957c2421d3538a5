"""`merge` and `unmerge`: adapters into the base's weights, and out of them again."""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.split import join, split
from lora_jax.core.algebra import dense
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError, MergeError, StructureError
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.core.weights import Adapted, LoraWeight, require_whole


def merge(
    params: Any, dtype: Any = None, *, donate: bool = False, return_error: bool = False
) -> Any:
    """An ordinary parameter tree again: `W + scale · A · B` where a `LoraWeight` stood.

    Added in float32 (float64 where a factor is) and rounded once, on each leaf by one compiled
    function, a stack of layers one layer after the other. The base is not changed.

    Args:
      params: a joined tree.
      dtype: dtype of the merged leaves; None keeps each base leaf's own.
      donate: let each merged leaf take the memory of its base leaf, which is deleted.
      return_error: also return what rounding did to the update.

    Returns:
      The merged tree; with `return_error`, also `{path: error}`: the update actually applied
      against the exact one, ‖applied − ΔW‖/‖ΔW‖ as a float (0 for an exact merge, near 1 where the
      dtype is too coarse to hold the update). It is 0 where the update is zero.

    Raises:
      MergeError: an A, B, scale or trained leaf holds NaN or infinity; nothing is donated then.
        Not checked while tracing.
      StructureError: these are adapters without their base or of another shape, or shapes without
        values.
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
    _check_finite(nodes)
    errors: dict[str, Any] = {}
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> jax.Array:
        target = jnp.dtype(dtype or node.w.dtype)
        base, rest = split(node)
        if return_error:
            errors[path] = _rounding_error(base, rest, target, _how(base, rest))
        return _combine(base, rest, target, donate and owners[id(base)] == 1)

    merged = map_adapted(one, params)
    if not return_error:
        return merged
    return merged, {path: _as_float(error) for path, error in errors.items()}


def unmerge(merged: Any, adapters: Any, *, donate: bool = False) -> Any:
    """The joined tree whose merge is `merged`: `W = merged − scale · A · B`, adapters attached.

    Subtracted in float32 and rounded once, so a base in a coarse dtype comes back to within its
    rounding; keep the base (`split`) where it must come back to the bit. A leaf trained whole keeps
    its trained value on both sides, for what it replaced is not known.

    Args:
      merged: a tree as `merge` returns it.
      adapters: the overlay that was merged.
      donate: let each base leaf take the memory of its merged leaf, which is deleted.

    Raises:
      StructureError: the adapters do not fit; all differences are listed.
      MergeError: an adapter holds NaN or infinity, or has a magnitude (DoRA): the norms of `W +
        scale · A · B` are not in the merged weight.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.array([[2.0, 4.0]]), jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
    >>> params = lora_jax.LoraWeight(w, a, b, jnp.float32(1.0), layout=lora_jax.Layout("io"))
    >>> _, adapters = lora_jax.split(params)
    >>> unmerge(merge(params), adapters).w
    Array([[2., 4.]], dtype=float32)
    """
    joined = join(merged, adapters)
    nodes = adapted_nodes(joined)
    directed = [
        path for path, node in nodes.items() if getattr(node, "magnitude", None) is not None
    ]
    if directed:
        raise MergeError(
            f"unmerge: {', '.join(directed)}: with a magnitude (DoRA) the base cannot be had back "
            "from what was merged; keep it, base, adapters = split(params), and join them again"
        )
    _check_finite(nodes)
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        base, rest = split(node)
        negative = dataclasses.replace(rest, scale=-rest.scale)
        donated = donate and owners[id(base)] == 1
        return dataclasses.replace(node, w=_combine(base, negative, base.dtype, donated))

    return map_adapted(one, joined)


def _sum(base: jax.Array, rest: Adapted, *, dtype: Any, how: str) -> jax.Array:
    """`W + scale · A · B` in `dtype`; of stacked layers one after the other, unless how="whole"."""
    if how == "whole":
        return dense(dataclasses.replace(rest, w=base), dtype)
    stack = _carried(base, how)
    in_place = base.dtype == dtype  # then the sum takes the place of the layer that it read

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        layer, start = _layer(out if in_place else stack, base.dtype, rest, i)
        return lax.dynamic_update_slice(out, _carried(dense(layer, dtype), how), start)

    start = stack if in_place else _carried(jnp.zeros(base.shape, dtype), how)
    return _cast(lax.fori_loop(0, math.prod(_stack(rest)), one, start), dtype)


def _how(base: Any, rest: Adapted) -> str:
    """How to go through a leaf: "whole", layer by layer ("layers"), or so on its bits ("bits")."""
    if not isinstance(rest, LoraWeight) or math.prod(_stack(rest)) == 1:
        return "whole"
    if not isinstance(base, jax.Array) or any(map(_is_traced, jax.tree.leaves((base, rest)))):
        return "layers"  # there is no gradient through bits
    held = base.sharding.shard_shape(base.shape)
    if any(held[i] != base.shape[i] for i in rest.layout.positions("b")):
        return "whole"  # the layers lie on several devices: all work at the same time
    # jaxlib 0.10 on a CPU converts a whole array of 16-bit floats to write one slice of it.
    on_cpu = all(device.platform == "cpu" for device in base.devices())
    return "bits" if on_cpu and base.dtype.itemsize < 4 else "layers"


def _carried(x: jax.Array, how: str) -> jax.Array:
    """`x` as a loop over its layers carries it."""
    return _cast(x, f"uint{8 * x.dtype.itemsize}") if how == "bits" else x


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """The same bits as another dtype; `x` itself, gradients and all, where it is the same."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _stack(rest: Any) -> tuple[int, ...]:
    """The sizes of the batch axes of a `LoraWeight`."""
    return rest.scale.shape


def _layer(
    stack: jax.Array, dtype: Any, rest: Any, i: jax.Array
) -> tuple[LoraWeight, tuple[Any, ...]]:
    """The i-th layer of a stack, its batch axes of size 1, and where in the stack it begins."""
    index: list[jax.Array] = []  # one number for each batch axis
    for size in reversed(_stack(rest)):
        i, last = lax.div(i, size), lax.rem(i, size)
        index.insert(0, last)
    where = dict(zip(rest.layout.positions("b"), index, strict=True))
    start = tuple(where.get(axis, 0) for axis in range(stack.ndim))
    sizes = tuple(1 if axis in where else size for axis, size in enumerate(stack.shape))

    def part(x: jax.Array) -> jax.Array:  # of a factor, whose batch axes come first
        inner = x.shape[len(index) :]
        return lax.dynamic_slice(x, (*index, *(0 for _ in inner)), (*(1 for _ in index), *inner))

    w = _cast(lax.dynamic_slice(stack, start, sizes), dtype)
    return dataclasses.replace(jax.tree.map(part, rest), w=w), start


_STATIC = ("dtype", "how")
_sum_kept = jax.jit(_sum, static_argnames=_STATIC)
_sum_donated = jax.jit(_sum, static_argnames=_STATIC, donate_argnums=0)


def _owners(nodes: dict[str, Adapted]) -> Counter[int]:
    """In how many places each base array stands: one that stands in two cannot be given away."""
    return Counter(id(node.w) for node in nodes.values())


def _combine(base: jax.Array, rest: Adapted, dtype: Any, donate: bool) -> jax.Array:
    # Only a result of the same dtype can take the base's memory.
    combine = _sum_donated if donate and dtype == base.dtype else _sum_kept
    return combine(base, rest, dtype=jnp.dtype(dtype), how=_how(base, rest))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _rounding_error(base: jax.Array, rest: Adapted, dtype: Any, how: str) -> jax.Array:
    """‖lost‖/‖update‖, the squares summed layer by layer like the update itself."""
    layers = 1 if how == "whole" else math.prod(_stack(rest))

    def one(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        node = dataclasses.replace(rest, w=base)
        if how != "whole":
            node, _ = _layer(_carried(base, how), base.dtype, rest, i)
        lost, update = _squared_norms(node, dtype)
        return sums[0] + lost, sums[1] + update

    zero = jnp.zeros((), accumulator(base.dtype, dtype))
    lost, update = lax.fori_loop(0, layers, one, (zero, zero))
    return jnp.where(update > 0, jnp.sqrt(lost / jnp.where(update > 0, update, 1)), 0)


def _squared_norms(node: Adapted, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Of what rounding to `dtype` takes from one leaf, and of the leaf's update."""
    wide = accumulator(node.w.dtype, dtype)
    exact = dense(node, wide)
    # The compiler may skip a cast down and up again; reduce_precision it must carry out.
    info = jnp.finfo(dtype)
    lost = lax.reduce_precision(exact, info.nexp, info.nmant) - exact
    update = exact - node.w.astype(wide)
    return jnp.sum(lost * lost), jnp.sum(update * update)


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _as_float(x: jax.Array) -> Any:
    return x if _is_traced(x) else float(x)


def _check_finite(nodes: dict[str, Adapted]) -> None:
    parts = {
        f"{path}: {field.name}": getattr(node, field.name)
        for path, node in nodes.items()
        for field in dataclasses.fields(node)
        if field.name in ("a", "b", "scale", "magnitude", "value")
        and getattr(node, field.name) is not None
    }
    abstract = [name for name, x in parts.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise StructureError("merge: no values yet, only shapes: " + ", ".join(abstract))
    finite = _all_finite(list(parts.values()))
    if any(map(_is_traced, finite)):  # of constants too, where the caller is being traced
        return
    finite = jax.device_get(finite)
    wrong = [name for name, ok in zip(parts, finite, strict=True) if not ok]
    if wrong:
        raise MergeError(
            "these hold NaN or infinity, so merging would destroy the base weights: "
            + ", ".join(wrong)
        )


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in arrays]
