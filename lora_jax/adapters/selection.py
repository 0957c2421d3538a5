"""What a configuration selects besides its targets: layers, biases, and rows of embeddings."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core import dtypes
from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import LayoutError, TargetError, grouped
from lora_jax.core.layout import Layout
from lora_jax.core.paths import layer_number
from lora_jax.core.patterns import lookup, nearest
from lora_jax.engine import layout_inference
from lora_jax.engine.uses import Use, Uses

#: The name of a bias in most libraries, and in Haiku.
BIAS_NAMES = ("bias", "b")

#: The names of an embedding, for use where no lookup shows that it is one.
EMBEDDING_NAMES = ("embedding", "embeddings")

#: The last name in a path.
LEAF = re.compile(r"[^/.]*\Z")


#: Which layers of a leaf that stacks layers are adapted, by path: booleans `[*batch]`.
Masks = dict[str, np.ndarray]

#: The numbers of the layers in a leaf, and the size of the stack that they belong to.
_InStack = tuple[Sequence[int], int]


def select_layers(
    config: LoraConfig, targets: Mapping[str, str], chosen: Mapping[str, Layout], leaves: Any
) -> tuple[dict[str, Layout], Masks]:
    """Return the targets that are in the layers `config.layers`, and masks for the stacked ones.

    A target whose path has no layer number counts as a stack of layers if it has batch axes; the
    first of them counts the layers.

    Raises:
      TargetError: a number or the slice selects no target; an entry of `targets` names leaves
        without a layer; or a leaf has a number as well as batch axes, and no pattern says which of
        them counts the layers.
    """
    if config.layers is None:
        return dict(chosen), {}
    _check_ambiguous(config, chosen)
    sizes = _stack_sizes(config, leaves)
    kept: dict[str, Layout] = {}
    masks: Masks = {}
    layers_of: dict[str, _InStack] = {}
    for path, layout in chosen.items():
        place = layer_number(path, config.layers_pattern)
        if place is not None:
            layers_of[path] = [place[1]], sizes[place[0]]
        elif _is_stack(config, path, layout):
            size = layout.select("b", leaves[path].shape)[0]
            layers_of[path] = range(size), size
        else:
            continue
        wanted = np.isin(layers_of[path][0], _numbers(config.layers, layers_of[path][1]))
        if wanted.any():
            kept[path] = layout
        if place is None:
            batch = layout.select("b", leaves[path].shape)
            masks[path] = np.broadcast_to(wanted.reshape(-1, *(1 for _ in batch[1:])), batch)
    _check_layers(config, targets, layers_of, kept)
    return kept, {path: mask for path, mask in masks.items() if path in kept}


def _check_ambiguous(config: LoraConfig, chosen: Mapping[str, Layout]) -> None:
    """Raise if a target has a number and batch axes: it may be experts of a block, or a stack."""
    unclear = [
        f"layers: {path} has a number in its path and batch axes ({layout.axes}), and either may "
        "count the layers. Say which with layers_pattern=: the name before the number, or the name "
        "of the stacked module"
        for path, layout in chosen.items()
        if config.layers_pattern is None and "b" in layout.axes and layer_number(path)
    ]
    if unclear:
        raise TargetError("\n".join(unclear))


def _stack_sizes(config: LoraConfig, leaves: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of layers of each stack: one more than its highest number."""
    sizes: dict[str, int] = {}
    for path in leaves:
        place = layer_number(path, config.layers_pattern)
        if place is not None:
            sizes[place[0]] = max(sizes.get(place[0], 0), place[1] + 1)
    return sizes


def _is_stack(config: LoraConfig, path: str, layout: Layout) -> bool:
    pattern = config.layers_pattern
    return "b" in layout.axes and (pattern is None or pattern in re.split(r"[/.]", path))


def _numbers(layers: Any, size: int) -> list[int]:
    """Return the selected layers of a stack of `size`; numbers beyond it are left out."""
    if isinstance(layers, slice):
        return list(range(size)[layers])
    return [range(size)[number] for number in layers if -size <= number < size]


def _check_layers(
    config: LoraConfig,
    targets: Mapping[str, str],
    layers_of: Mapping[str, _InStack],
    kept: Mapping[str, Layout],
) -> None:
    if not layers_of:
        some = ", ".join(list(targets)[:3])
        raise TargetError(
            f"layers: no target has a layer number in its path or stacks layers ({some}). Say "
            "where the numbers are with layers_pattern="
        )
    numbers = sorted({number for at, _ in layers_of.values() for number in at})
    where = f"the targets are in layers {', '.join(map(str, numbers))}"
    problems = []
    if not kept:
        problems.append(f"layers: {config.layers} selects no target; {where}")
    elif not isinstance(config.layers, slice):
        problems += [
            f"layers: {number} selects no target; {where}"
            for number in config.layers or ()
            if not any(set(_numbers((number,), size)) & {*at} for at, size in layers_of.values())
        ]
    if isinstance(config.targets, tuple):
        named = {entry for path, entry in targets.items() if path in layers_of}
        problems += [
            f"targets: {entry!r} has no layer number in its path, so layers= leaves it out. "
            "Remove it from targets, or say where the numbers are with layers_pattern="
            for entry in dict.fromkeys(targets.values())
            if entry not in named
        ]
    if problems:
        raise TargetError(grouped(problems))


def select_biases(
    config: LoraConfig, adapted: Mapping[str, Layout], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, str]:
    """Return the paths of the biases that `config.bias` trains, each with its kernel's path.

    The bias of an adapted kernel is the leaf beside it with the shape of the kernel's batch and out
    axes. With bias="all" the kernel's path is "".

    Raises:
      TargetError: there are none.
    """
    if config.bias == "none":
        return {}
    found = {}
    for path, leaf in leaves.items():
        if path not in adapted and _is_bias(path, leaf, uses):
            kernel = "" if config.bias == "all" else _kernel_of(path, leaf, adapted, leaves)
            if kernel is not None:
                found[path] = kernel
    if not found:
        beside = "beside an adapted kernel " if config.bias == "adapted" else ""
        names = " or ".join(BIAS_NAMES)
        raise TargetError(
            f'bias="{config.bias}": no leaf named {names} {beside}is a bias. Name it with train='
        )
    return found


def _is_bias(path: str, leaf: Any, uses: Uses) -> bool:
    name = re.split(r"[/.]", path)[-1]
    if name not in BIAS_NAMES or not dtypes.is_floating(leaf) or not leaf.shape:
        return False
    if name == "bias":
        return True
    # "b" is short for many things.
    if uses is None:
        return len(leaf.shape) == 1
    return not layout_inference.contractions(uses.get(path, ()))


def _kernel_of(
    path: str, bias: Any, adapted: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> str | None:
    """Return the adapted kernel of a bias: in the same module, with outputs of its shape."""
    for kernel, layout in adapted.items():
        beside = LEAF.sub("", kernel) == LEAF.sub("", path)
        if beside and layout.select("bo", leaves[kernel].shape) == tuple(bias.shape):
            return kernel
    return None


@dataclasses.dataclass(frozen=True)
class ChosenRows:
    """Which rows of a weight train, and the axis along which they lie."""

    rows: tuple[int, ...]
    axis: int
    layout: Layout


def select_rows(config: LoraConfig, leaves: Mapping[str, Any], uses: Uses) -> dict[str, ChosenRows]:
    """Return the rows that train, by the path of their weight.

    Raises:
      TargetError: a key of `config.rows` matches no weight, or a row is beyond the weight.
      LayoutError: nothing says along which axis the rows lie.
    """
    weights = {p: x for p, x in leaves.items() if dtypes.is_floating(x) and len(x.shape) > 1}
    unused = [key for key in config.rows if not any(lookup({key: 0}, p) for p in weights)]
    if unused:
        raise TargetError(
            "\n".join(f"rows: {key!r} matches no weight; {nearest(key, weights)}" for key in unused)
        )
    found = {}
    for path, w in weights.items():
        match = lookup(config.rows, path)
        if match is None:
            continue
        layout = _row_layout(config, path, w, () if uses is None else uses.get(path, ()))
        axis = _row_axis(config, path, w, layout)
        size = w.shape[axis]
        beyond = [row for row in match[1] if row >= size]
        if beyond:
            raise TargetError(f"{path}: rows {beyond} are beyond the {size} of {tuple(w.shape)}")
        found[path] = ChosenRows(match[1], axis, layout)
    return found


def _row_layout(config: LoraConfig, path: str, w: Any, uses: Sequence[Use]) -> Layout:
    """Return the layout of a weight of which some rows train.

    It is the configured layout, else that of the weight's lookups, else "io" for a weight named as
    an embedding, else, if `rows_axis` is configured, that of its other uses or its shape.
    """
    chosen, ndim = config.for_path(path), len(w.shape)
    if chosen.layout is not None and len(chosen.layout) == ndim:
        return Layout(chosen.layout)
    lookups = [use for use in uses if use.primitive == "gather"]
    layout = layout_inference.layout_from_uses(ndim, lookups)
    if layout is not None:  # a tied embedding has other uses besides
        contractions = layout_inference.contractions(uses)
        return Layout(layout.axes, tuple(dict.fromkeys(use.primitive for use in contractions)))
    if ndim == 2 and LEAF.findall(path)[0] in EMBEDDING_NAMES:
        return Layout("io", tuple(dict.fromkeys(use.primitive for use in uses)))
    if chosen.rows_axis is None:
        raise _no_axis(path, w)
    layout = layout_inference.layout_from_uses(ndim, uses)
    return layout_inference.layout_from_shape(path, w.shape) if layout is None else layout


def _row_axis(config: LoraConfig, path: str, w: Any, layout: Layout) -> int:
    """Return the axis along which the rows lie: the configured one, else the layout's in axis."""
    ndim, axis = len(w.shape), config.for_path(path).rows_axis
    if axis is None:
        ins = layout.positions("i")
        if len(ins) != 1:
            raise _no_axis(path, w)
        return ins[0]
    if not -ndim <= axis < ndim or layout.axes[axis] == "b":
        raise LayoutError(
            f"{path}: rows_axis={axis} is not an in or out axis of {tuple(w.shape)} with layout "
            f"{layout.axes!r}"
        )
    return axis % ndim


def _no_axis(path: str, w: Any) -> LayoutError:
    return LayoutError(
        f"{path}: cannot tell along which axis of {tuple(w.shape)} the rows lie, because the "
        "function does not look them up. Name the axis: "
        f'overrides={{"{path}": Override(rows_axis=0)}}'
    )
