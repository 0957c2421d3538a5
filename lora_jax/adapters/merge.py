"""`merge` and `unmerge`: add adapters to the base weights, and subtract them again."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.merge_leaf import (
    Target,
    choose_form,
    combine,
    is_traced,
    rounding_error,
    target_of,
)
from lora_jax.adapters.split import join, split
from lora_jax.core.errors import ConfigError, MergeError, StructureError, grouped
from lora_jax.core.quantized.coding import check_kind
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.slots import has_magnitude
from lora_jax.core.tree import Wrapped, adapted_nodes, map_adapted
from lora_jax.core.weights import Adapted, LoraWeight, require_whole


def merge(
    params: Any,
    dtype: Any = None,
    *,
    requantize: bool | str = False,
    donate: bool = False,
    return_error: bool = False,
) -> Any:
    """Return an ordinary parameter tree, with `W + scale · A · B` in place of each `LoraWeight`.

    The sum is computed in float32 (float64 if a factor is) and rounded once, by one compiled
    function per leaf that goes through a stack of layers one layer at a time. The base is not
    changed.

    A quantized base leaf is dequantized, and its merged leaf is an ordinary array, unless
    `requantize` asks for codes. Rounding to them loses most of an update that was trained without
    regard to it, see `return_error`; train with `lora(fn, merge_aware=True)` to keep it. Leaves
    without an adapter stay as they are.

    Args:
      params: a joined tree of one adapter: of a stack, merge `unstack(params)[slot]`. Or a model of
        `lora_jax.nnx` or `lora_jax.equinox`, which becomes an ordinary model of its class.
      dtype: dtype of the merged leaves; None keeps the dtype of each base leaf.
      requantize: quantize the merged leaves whose base is quantized: True as each base is, or the
        name of a kind, such as "nf4", along the same axis. Leaves that the adapter does not change
        keep their codes to the bit.
      donate: let each merged leaf take the memory of its base leaf, which is deleted, where the two
        have the same dtype or kind.
      return_error: also return how much of the update is lost to rounding.

    Returns:
      The merged tree. With `return_error` also `{path: error}`, where error compares the update
      that was applied with the exact one: ‖applied − ΔW‖/‖ΔW‖ as a float. It is 0 if the merge is
      exact or the update is zero, and near 1 if the dtype or the kind is too coarse for it.

    Raises:
      MergeError: an A, B, scale, magnitude or trained value contains NaN or infinity. Nothing has
        been donated then. Not checked under tracing.
      StructureError: the adapters have no base or do not fit it, or are shapes without values.
      ConfigError: `dtype` is not a floating dtype, or a leaf cannot be quantized as asked: its kind
        is one that can only be read, or its blocks do not divide the axis.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.array([[2.0, 4.0]]), jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
    >>> merge(lora_jax.LoraWeight(w, a, b, jnp.float32(1.0), layout=lora_jax.Layout("io")))
    Array([[4., 8.]], dtype=float32)
    """
    if isinstance(params, Wrapped):
        options = {"dtype": dtype, "requantize": requantize, "donate": donate}
        return params.merge(**options, return_error=return_error)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"merge: dtype must be a floating dtype, got {jnp.dtype(dtype)}")
    check_kind("merge", "requantize", requantize)
    nodes = adapted_nodes(params)
    for path, node in nodes.items():
        require_whole(path, node)
    targets = _targets(nodes, dtype, requantize)
    check_finite(nodes)
    errors: dict[str, Any] = {}
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> Any:
        target = targets[path]
        base, rest = split(node)
        if return_error:
            errors[path] = rounding_error(base, rest, target, choose_form(base, rest))
        return combine(base, rest, target, donate and owners[id(base)] == 1)

    merged = map_adapted(one, params)
    if not return_error:
        return merged
    return merged, {path: _as_float(error) for path, error in errors.items()}


def _targets(nodes: Mapping[str, Adapted], dtype: Any, requantize: bool | str) -> dict[str, Target]:
    """Return what each merged leaf becomes; all that cannot be quantized are listed at once."""
    targets, problems = {}, []
    for path, node in nodes.items():
        try:
            targets[path] = target_of(node.w, dtype, requantize)
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError("merge: " + grouped(problems))
    return targets


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
      MergeError: an adapter contains NaN or infinity; or has a magnitude (DoRA), because the merged
        weight does not store the norms of `W + scale · A · B`; or a merged leaf is quantized,
        because its codes do not tell those of the base.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.array([[2.0, 4.0]]), jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
    >>> params = lora_jax.LoraWeight(w, a, b, jnp.float32(1.0), layout=lora_jax.Layout("io"))
    >>> _, adapters = lora_jax.split(params)
    >>> unmerge(merge(params), adapters).w
    Array([[2., 4.]], dtype=float32)
    """
    joined = join(merged, adapters)
    nodes = adapted_nodes(joined)
    for path, node in nodes.items():
        require_whole(path, node)
    with_magnitude = [path for path, node in nodes.items() if has_magnitude(node)]
    if with_magnitude:
        raise MergeError(
            f"unmerge: cannot recover the base weight of {', '.join(with_magnitude)}: with DoRA "
            "the column norms are not stored in the merged weight. Keep the base instead: "
            "base, adapters = split(params), later join(base, adapters)"
        )
    with_codes = [path for path, node in nodes.items() if is_quantized(node.w)]
    if with_codes:
        raise MergeError(
            f"unmerge: cannot recover the base weight of {', '.join(with_codes)}: the merged "
            "weight is quantized, and its codes do not tell those of the base. Keep the base "
            "instead: base, adapters = split(params), later join(base, adapters)"
        )
    check_finite(nodes)
    owners = _owners(nodes)

    def one(path: str, node: Adapted) -> Adapted:
        if not isinstance(node, LoraWeight):
            return node
        base, rest = split(node)
        negative = dataclasses.replace(rest, scale=-rest.scale)
        donated = donate and owners[id(base)] == 1
        return dataclasses.replace(node, w=combine(base, negative, base.dtype, donated))

    return map_adapted(one, joined)


def _owners(nodes: dict[str, Adapted]) -> Counter[int]:
    """Count the places of each base array: one that stands in two places cannot be donated."""
    return Counter(id(node.w) for node in nodes.values())


def _as_float(x: jax.Array) -> Any:
    return x if is_traced(x) else float(x)


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
    if any(map(is_traced, finite)):  # also of constants, if the caller is being traced
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
