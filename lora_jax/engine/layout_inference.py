"""Which axes of each weight are batch, in and out: read off the program, or off the shape."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core.config import LoraConfig
from lora_jax.core.dtypes import is_floating
from lora_jax.core.errors import LayoutError, TargetError, grouped
from lora_jax.core.layout import Layout
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.engine.context import Context
from lora_jax.engine.custom_rules import Rule
from lora_jax.engine.lazy_weight import LazyWeight
from lora_jax.engine.program import FIRST, Argument, Program, is_dynamic
from lora_jax.engine.uses import OPAQUE, Use, Uses

#: The widest window that a 2-D convolution may have to be recognized by its shape.
MAX_WINDOW = 32


def layouts_of(
    config: LoraConfig, targets: Mapping[str, str], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, Layout]:
    """Return the layout of every target: the one in `config`, the program's, or the shape's.

    Args:
      config: may name a layout per target, in `overrides`.
      targets: the paths of the weights to adapt.
      leaves: the weights by path.
      uses: what `infer_uses` found, or None where no function was given.

    Raises:
      LayoutError: a layout that does not fit, or a shape that leaves a choice.
      TargetError: the program contracts a target with nothing.
    """
    found: dict[str, Layout] = {}
    problems: list[Exception] = []
    for path in targets:
        shape, named = leaves[path].shape, config.for_path(path).layout
        own = () if uses is None else uses.get(path, ())
        try:
            if named is not None:
                found[path] = _named_layout(path, shape, named)
            elif uses is None or is_opaque(own):
                found[path] = layout_from_shape(path, shape)
            else:
                found[path] = _used_layout(path, len(shape), own)
        except (LayoutError, TargetError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])(grouped(map(str, problems)))
    return found


def infer_uses(
    fn: Callable,
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, list[Use]]:
    """Return every use that `fn(params, *args, **kwargs)` makes of its floating parameters.

    By path. The interpreter runs on shapes alone; nothing is computed or allocated.
    """
    # those of params come first
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_quantized)
    n_params = len(jax.tree.leaves(params, is_leaf=is_quantized))
    traced = {
        i: _abstract(leaf)
        for i, leaf in enumerate(leaves)
        if is_dynamic(leaf) or is_quantized(leaf) or (i < n_params and _is_weight(leaf))
    }
    seen: list[Use] = []
    found: dict[str, list[Use]] = {}

    def enter(argument: Argument, path: str, leaf: Any) -> Any:
        if argument != FIRST or not _is_weight(leaf):
            return leaf
        found[path] = []
        return LazyWeight.tracked(leaf, path)

    def run(traced: dict[int, Any]) -> None:
        values = [traced.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, values)
        Program.of(fn, args, kwargs, enter).evaluate(Context(uses=seen, rules=rules))

    jax.eval_shape(run, traced)
    for use in seen:
        found[use.path].append(use)
    return found


def _is_weight(leaf: Any) -> bool:
    return is_floating(leaf) and leaf.ndim > 0


def _abstract(leaf: Any) -> Any:
    """Return an array itself, whose sharding can be part of its type; else its shape and dtype."""
    return leaf if isinstance(leaf, jax.Array) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def contractions(uses: Sequence[Use]) -> list[Use]:
    """Return the uses that multiply the weight with something or look up its rows."""
    return [use for use in uses if {"i", "o"} <= set(use.axes.values())]


def is_linear(uses: Sequence[Use]) -> bool:
    """Return whether a weight is a linear layer's: contracted with activations, never looked up.

    Where two weights meet (learned queries and a kernel), the right one is the layer.
    """
    found = contractions(uses)
    looked_up = any(use.primitive == "gather" for use in found)
    return not looked_up and any(not use.is_operand for use in found)


def is_opaque(uses: Sequence[Use]) -> bool:
    """Return whether a weight is used, but only by primitives that do not show how."""
    return bool(uses) and all(use.primitive in OPAQUE and not use.axes for use in uses)


def layout_from_uses(ndim: int, uses: Sequence[Use]) -> Layout | None:
    """Return the layout that a weight's uses imply; None where no use contracts it.

    Contracted and looked-up axes are in, axes that are batch in every use are batch, the rest out.
    Where uses disagree (a tied embedding: looked up, then attended to) the first one decides.
    """
    found = contractions(uses)
    if not found:
        return None
    names = tuple(dict.fromkeys(use.primitive for use in found))
    lookup_only = names == ("gather",)
    kinds = []
    for axis in range(ndim):
        seen = [use.axes.get(axis, "o") for use in found]
        kinds.append(next((kind for kind in seen if kind != "b"), "b"))
    if {"i", "o"} <= set(kinds):
        return Layout("".join(kinds), names, lookup_only)
    # One use's in axis is another's batch axis: only what one use says is sure to have both.
    axes = "".join(found[0].axes.get(axis, "o") for axis in range(ndim))
    return Layout(axes, names, lookup_only)


def layout_from_shape(path: str, shape: Sequence[int]) -> Layout:
    """Return the layout of a weight whose shape leaves no choice.

    Two axes are `[in, out]`; four axes of which the first two are equal and small are a 2-D
    convolution `[height, width, in, out]`.

    Raises:
      LayoutError: any other shape.
    """
    if len(shape) == 2:
        return Layout("io")
    if len(shape) == 4 and shape[0] == shape[1] <= MAX_WINDOW:
        return Layout("iiio")
    raise LayoutError(
        f"{path}: the shape {tuple(shape)} alone does not show which axes are in and which are "
        "out. Pass init the function and example arguments, init(key, params, config, fn, *args), "
        f'or name the layout, overrides={{"{path}": Override(layout="..." )}}'
    )


def _named_layout(path: str, shape: Sequence[int], axes: str) -> Layout:
    if len(axes) != len(shape):
        raise LayoutError(f"{path}: layout {axes!r} does not fit the shape {tuple(shape)}")
    return Layout(axes)


def _used_layout(path: str, ndim: int, uses: Sequence[Use]) -> Layout:
    layout = layout_from_uses(ndim, uses)
    if layout is None:
        raise TargetError(
            f"{path}: never contracted with an activation, so it has no low-rank update; it is "
            f"used by {_describe(uses)}. Leave it out with exclude=, train all of it with train=, "
            f'or name its layout, overrides={{"{path}": Override(layout="io")}}'
        )
    return layout


def _describe(uses: Sequence[Use]) -> str:
    """Return what a weight is used for: "`add` at model.py:12, `mul` at model.py:13"."""
    sites = dict.fromkeys(
        f"`{use.primitive}` at {use.line}" + (", with no out axis left" if use.axes else "")
        for use in uses
    )
    return ", ".join(sites) if sites else "nothing"
