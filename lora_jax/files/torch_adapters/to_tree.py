"""Turn the `Contents` of a file into an overlay of a tree."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.config import LoraConfig
from lora_jax.core.dora import column_norms
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import AdapterFileError, grouped, warn_user
from lora_jax.core.foreign import shown
from lora_jax.core.layout import Layout
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.sharding.placement import Placement
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.files.disk.processes import to_host
from lora_jax.files.naming import Place
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, by_leaf
from lora_jax.files.torch_adapters.factors import (
    TorchFactors,
    common_dtype,
    concatenate,
    join_factors,
)


class FitOptions(TypedDict, total=False):
    """What the readers of all formats hand on to `fit_to_base`.

    Attributes:
      strict: whether problems are an error, and not a warning; true by default.
      dtype: of the factors and the trained values; None for the file's.
      dropout: the rate of all factors; None for that of the contents.
      fsdp: as for `lora_jax.init`; factors are placed by the shardings of their weights.
    """

    strict: bool
    dtype: Any
    dropout: float | None
    fsdp: str | Sequence[str] | None


def fit_to_base(
    source: object,
    contents: Contents,
    problems: list[str],
    model: TorchBase,
    *,
    strict: bool = True,
    dtype: Any = None,
    dropout: float | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> Any:
    """Return the overlay of a file's contents; all problems give one error or one warning.

    Args:
      source: the file, which messages begin with.
      contents, model: as for `overlay`.
      problems: what is wrong with the file already.
      strict, dtype, dropout, fsdp: see `FitOptions`.

    Raises:
      AdapterFileError: there are problems and `strict` is true, or nothing is left.
      ConfigError: `dropout` is not a probability below 1.
    """
    if dropout is not None:
        contents.dropout = LoraConfig(dropout=dropout).dropout
    placement = Placement.of("load", model.leaves.values(), fsdp)
    adapters, more = overlay(contents, model, dtype, placement)
    lines = grouped(sorted({*problems, *more}), "tensors") or "it contains no adapters"
    if strict and (problems or more):
        raise AdapterFileError(f"{source} does not fit the base:\n{lines}")
    if not adapted_nodes(adapters):
        raise AdapterFileError(f"{source}: nothing in this file fits the base:\n{lines}")
    if problems or more:
        warn_user(f"{source}: ignored what does not fit the base:\n{lines}")
    return adapters


def overlay(
    contents: Contents, model: TorchBase, dtype: Any, placement: Placement
) -> tuple[Any, list[str]]:
    """Return the overlay of a file's contents, and the problems of what was left out.

    Layers of a stack that are not in the file get zero factors and the scale 0. Different ranks in
    a stack are padded with zeros.

    Args:
      contents: all names are in the model.
      model: the base.
      dtype: of the factors and the trained values; None for the file's.
      placement: where the arrays belong.
    """
    nodes: dict[str, Adapted] = {}
    problems = _check_untrained(contents, model)
    if not 0 <= contents.dropout < 1:  # 1 is a probability, but no rate at which anything trains
        problems.append(f"the dropout is {contents.dropout}; pass dropout=, a rate below 1")
        contents.dropout = 0.0
    whole = dict(contents.whole)
    for name, added in contents.added.items():
        value = whole.get(name, model.value(name))
        if value is None:
            problems.append(f"{name}: lora_bias adds to this bias, so base must contain its value")
        else:
            whole[name] = _cast(value.astype("float64") + added, value.dtype)
    made: list[_Made] = [
        _make_lora_weight(model.places[path], contents, model)
        for path in by_leaf({**contents.factors, **contents.experts}, model)
    ]
    made += [_make_trained_leaf(model.places[path], whole, model) for path in by_leaf(whole, model)]
    for name, (rows, values) in contents.rows.items():
        made += [_make_trained_rows(place, at, rows, values) for place, at, _ in model.index[name]]
    for path, node in made:
        if isinstance(node, str):
            problems.append(f"{path}: {node}")
        elif path in nodes:
            problems.append(f"{path}: has LoRA factors and is also listed as fully trained")
        elif not _is_finite(node, dtype):
            held = jnp.dtype(dtype).name if dtype else "their dtype"
            problems.append(f"{path}: has values that overflow {held}")
        else:
            nodes[path] = node
    in_jax = {path: _to_jax(node, dtype) for path, node in nodes.items()}
    leaves = [
        placement.place(in_jax[path], leaf) if path in in_jax else None
        for path, leaf in model.leaves.items()
    ]
    return jax.tree_util.tree_unflatten(model.treedef, leaves), problems


#: A leaf's path, and its node or why it has none.
_Made = tuple[str, Adapted | str]


def _check_untrained(contents: Contents, model: TorchBase) -> list[str]:
    """List copies of base weights that differ from the base, which was resized or trained."""
    problems = []
    for name, tensor in contents.untrained.items():
        value = model.value(name)
        if value is None:
            continue
        coarse = max(float(jnp.finfo(x.dtype).eps) for x in (tensor, value))
        pair = tensor.astype("float32"), value.astype("float32")
        same = np.isclose(*pair, rtol=2 * coarse, atol=1e-6)
        if not same.all():
            rows = np.flatnonzero(~same.reshape(len(same), -1).all(1)).tolist()
            where = f" in rows {shown(rows, 60)}" if len(rows) < len(same) else ""
            problems.append(
                f"{name}: the file has a base weight that differs from this base's{where}; the "
                "adapter was trained on the file's"
            )
    return problems


def _factors(contents: Contents, name: str, expert: int | None) -> TorchFactors | None:
    if expert is None:
        return contents.factors.get(name)
    experts = contents.experts.get(name)
    return None if experts is None else experts.of(expert)


def _make_lora_weight(place: Place, contents: Contents, model: TorchBase) -> _Made:
    layers: dict[tuple[int, ...], TorchFactors] = {}
    for where, names, expert in place.modules():
        parts = [_factors(contents, name, expert) for name in names]
        if len(place.entry.paths) > 1:
            parts = [part and part.cut(place.start, place.stop) for part in parts]
        try:
            joined = join_factors(parts, place.widths)
        except ValueError:
            return place.path, f"cannot join {', '.join(names)}: only some of them have DoRA"
        if joined is not None:
            layers[where] = joined
    rank = max(layer.rank for layer in layers.values())
    padded = {where: layer.pad(rank) for where, layer in layers.items()}
    layout, batch = Layout(place.entry.layout), place.batch
    node = LoraWeight(
        None,
        _stack({w: place.a_to_tree(x.a) for w, x in padded.items()}, batch),
        _stack({w: place.b_to_tree(x.b) for w, x in padded.items()}, batch),
        _stack({w: np.float32(x.scale) for w, x in padded.items()}, batch),
        layout=layout,
        dropout=float(contents.dropout),
    )
    with_magnitude = [x.magnitude is not None for x in padded.values()]
    if any(with_magnitude):
        magnitudes = {w: place.out_to_tree(x.magnitude) for w, x in padded.items()}
        node = dataclasses.replace(
            node, magnitude=_stack_magnitudes(node, magnitudes, place, model)
        )
    return place.path, node


def _stack(layers: Mapping[tuple[int, ...], Any], batch: tuple[int, ...]) -> np.ndarray:
    """Stack the layers' arrays, with zeros for missing layers."""
    first = np.asarray(next(iter(layers.values())))
    dtype = common_dtype(np.asarray(layer) for layer in layers.values())
    whole = np.zeros((*batch, *first.shape), dtype)
    for where, layer in layers.items():
        whole[where] = layer
    return whole


def _stack_magnitudes(
    node: LoraWeight, layers: Mapping[tuple[int, ...], Any], place: Place, model: TorchBase
) -> np.ndarray:
    """Stack the magnitudes, ‖W‖ for layers without one, so that those equal the base."""
    batch = place.batch
    stacked = _stack(layers, batch)
    base = model.leaves[place.path]
    if len(layers) < math.prod(batch):
        norms = np.ones_like(stacked)
        if not isinstance(base, jax.ShapeDtypeStruct):
            norms = to_host(column_norms(dataclasses.replace(node, w=jnp.asarray(base))))
        for where in np.ndindex(*batch):
            if where not in layers:
                stacked[where] = norms[where]
    return stacked


def _make_trained_leaf(place: Place, whole: Mapping[str, np.ndarray], model: TorchBase) -> _Made:
    base, found = model.leaves[place.path], {}
    for where, names in place.layers():
        parts = [whole.get(name) for name in names]
        if all(part is None for part in parts):
            continue
        known = [model.value(n) if x is None else x for n, x in zip(names, parts, strict=True)]
        values = [value for value in known if value is not None]
        if len(values) < len(names):
            return (
                place.path,
                "only a part of it is in the file, so base must have the values of the rest",
            )
        joined = concatenate(values, place.entry.out_axis)
        if len(place.entry.paths) > 1:
            axis = (slice(None),) * place.entry.out_axis
            joined = joined[(*axis, slice(place.start, place.stop))]
        found[where] = place.weight_to_tree(joined)
    value = np.zeros(place.shape, common_dtype(found.values()))
    if not isinstance(base, jax.ShapeDtypeStruct):
        value = _cast(np.array(to_host(dequantized(base))), value.dtype)
    for where, layer in found.items():
        value[place.at(where)] = layer
    return place.path, TrainedLeaf(None, value, _make_mask(place, found))


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return `x` in this dtype, or in a wider one if that overflows."""
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    if np.isfinite(narrow).all():
        return narrow
    return x.astype(common_dtype([x, narrow]))


def _make_mask(place: Place, found: Mapping[tuple[int, ...], Any]) -> np.ndarray:
    """Return 1 at the layers found and 0 elsewhere; a single 1 if that is all of them."""
    if len(found) == len(place.layers()):
        return np.ones((), "float32")
    stacked = {(letter,) for letter in place.entry.stacked}
    groups = place.entry.groups(len(place.shape))[1]
    mask = np.zeros([n if g in stacked else 1 for g, n in zip(groups, place.shape, strict=True)])
    for where in found:
        mask[place.at(where)] = 1
    return mask.astype("float32")


def _make_trained_rows(
    place: Place, where: tuple[int, ...], rows: tuple[int, ...], values: np.ndarray
) -> _Made:
    is_lookup = place.entry.kind == "embedding"
    layout = Layout(place.entry.layout)
    # the rows of a head [in, vocabulary] are its outputs
    axes = layout.positions("i" if is_lookup else "o")
    if where or len(axes) != 1:
        return place.path, "trained rows need one weight with one axis of rows"
    value = place.b_to_tree(values.T) if is_lookup else np.moveaxis(place.a_to_tree(values), -1, 0)
    one = np.ones((), "float32")
    return place.path, TrainedRows(None, value, one, rows=rows, axis=axes[0], layout=layout)


def _trained_fields(node: Adapted) -> dict[str, Any]:
    fields = {field: getattr(node, field, None) for field in ("a", "b", "magnitude", "value")}
    return {field: x for field, x in fields.items() if x is not None}


def _is_finite(node: Adapted, dtype: Any) -> bool:
    """Return whether the trained values stay finite in `dtype`, or in their own as JAX has it."""
    fields = _trained_fields(node).values()
    with np.errstate(over="ignore"):
        arrays = [
            np.asarray(x).astype(jax.dtypes.canonicalize_dtype(dtype or x.dtype)) for x in fields
        ]
    return all(np.isfinite(x).all() for x in arrays)


def _to_jax(node: Adapted, dtype: Any) -> Adapted:
    """Convert the node's arrays to JAX's, in `dtype`; the scale in the accumulation dtype."""
    trained: dict[str, Any] = {f: jnp.asarray(x, dtype) for f, x in _trained_fields(node).items()}
    scale = jnp.asarray(node.scale, accumulator(*(x.dtype for x in trained.values())))
    return dataclasses.replace(node, scale=scale, **trained)
