"""How a function uses its parameters: which axes of each are batch, in and out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core.config import LoraConfig
from lora_jax.core.dtypes import is_floating
from lora_jax.core.errors import LayoutError, TargetError
from lora_jax.core.layout import Layout
from lora_jax.core.paths import path_str
from lora_jax.engine.context import Context
from lora_jax.engine.custom_rules import Rule
from lora_jax.engine.lazy_weight import LazyWeight
from lora_jax.engine.program import Program
from lora_jax.engine.uses import OPAQUE, Use, Uses

#: The widest window of a 2-D convolution that is told from a stack of other kernels.
MAX_WINDOW = 32


def infer_uses(
    fn: Callable,
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rules: Mapping[str, Rule] | None = None,
) -> dict[str, list[Use]]:
    """Every use that `fn(params, *args, **kwargs)` makes of its floating parameters, by path.

    Runs the interpreter on shapes alone; nothing is computed or allocated.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(((params, *args), kwargs))
    first = (jax.tree_util.SequenceKey(0),) * 2  # of ((params, *args), kwargs)
    names = {
        i: path_str(path[2:])
        for i, (path, leaf) in enumerate(flat)
        if path[:2] == first and is_floating(leaf) and leaf.ndim
    }
    uses: list[Use] = []

    def run(arrays: dict[int, Any]) -> None:
        leaves = [
            LazyWeight.tracked(arrays[i], names[i]) if i in names else arrays.get(i, leaf)
            for i, (_, leaf) in enumerate(flat)
        ]
        Program(fn, treedef, leaves).evaluate(Context(uses=uses, rules=rules), leaves)

    dynamic = {
        # an array itself, whose sharding can be part of its type
        i: leaf if isinstance(leaf, jax.Array) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for i, (_, leaf) in enumerate(flat)
        if i in names or isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    }
    jax.eval_shape(run, dynamic)
    found: dict[str, list[Use]] = {name: [] for name in names.values()}
    for use in uses:
        found[use.path].append(use)
    return found


def contractions(uses: Sequence[Use]) -> list[Use]:
    """The uses that multiply the weight with something or look its rows up."""
    return [use for use in uses if {"i", "o"} <= set(use.axes.values())]


def is_linear(uses: Sequence[Use]) -> bool:
    """Whether a weight is a linear layer's: contracted with activations, and never looked up.

    Of two weights that meet each other (learned queries and a kernel) the right one is the layer.
    """
    found = contractions(uses)
    looked_up = any(use.primitive == "gather" for use in found)
    return not looked_up and any(not use.is_operand for use in found)


def layout_from_uses(ndim: int, uses: Sequence[Use]) -> Layout | None:
    """The layout that a weight's uses imply; None where no use contracts it.

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
    # One use's in is another's batch: only the first use's own reading is sure to have both.
    axes = "".join(found[0].axes.get(axis, "o") for axis in range(ndim))
    return Layout(axes, names, lookup_only)


def layout_from_shape(path: str, shape: Sequence[int]) -> Layout:
    """The layout of a weight whose shape leaves no choice, or an error that says what to do.

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
        f"{path}: the shape {tuple(shape)} alone does not say which axes are in and which are out; "
        "pass init the function and example arguments, init(key, params, config, fn, *args), or "
        f'name the layout, overrides={{"{path}": Override(layout="..." )}}'
    )


def describe(uses: Sequence[Use]) -> str:
    """ "`add` at model.py:12, `mul` at model.py:13": what a weight is used for."""
    sites = dict.fromkeys(
        f"`{use.primitive}` at {use.line}" + (", with no out axis left" if use.axes else "")
        for use in uses
    )
    return ", ".join(sites) if sites else "nothing"


def is_opaque(uses: Sequence[Use]) -> bool:
    """Whether a weight is used, and only where no one can see how."""
    return bool(uses) and all(use.primitive in OPAQUE and not use.axes for use in uses)


def layouts_of(
    config: LoraConfig, targets: Mapping[str, str], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, Layout]:
    """The layout of every target: the configuration's, the program's, or the shape's."""
    found: dict[str, Layout] = {}
    problems: list[Exception] = []
    for path in targets:
        shape = leaves[path].shape
        named = config.for_path(path).layout
        try:
            if named is not None:
                found[path] = _named_layout(path, shape, named)
            elif uses is None or is_opaque(uses.get(path, ())):
                found[path] = layout_from_shape(path, shape)
            else:
                found[path] = _used_layout(path, len(shape), uses.get(path, ()))
        except (LayoutError, TargetError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(str(problem) for problem in problems))
    return found


def _named_layout(path: str, shape: Sequence[int], axes: str) -> Layout:
    if len(axes) != len(shape):
        raise LayoutError(f"{path}: layout {axes!r} does not fit the shape {tuple(shape)}")
    return Layout(axes)


def _used_layout(path: str, ndim: int, uses: Sequence[Use]) -> Layout:
    layout = layout_from_uses(ndim, uses)
    if layout is None:
        raise TargetError(
            f"{path}: never contracted with an activation, so a low-rank update has no meaning; it "
            f"is used by {describe(uses)}. Leave it out with exclude=, train it whole with "
            f'train=, or, if you know better, name its layout: overrides={{"{path}": '
            'Override(layout="io")}'
        )
    return layout
