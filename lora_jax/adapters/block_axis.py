"""Along which axis a weight is divided into blocks: one that products sum over."""

from collections.abc import Sequence
from typing import Any

from lora_jax.adapters.selection import EMBEDDING_NAMES, LEAF
from lora_jax.core.errors import ConfigError, LayoutError, TargetError
from lora_jax.core.layout import Layout
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.quantized import has_whole_blocks
from lora_jax.engine import layout_inference
from lora_jax.engine.uses import Use


def choose_axis(
    path: str,
    w: Any,
    kind: str,
    uses: Sequence[Use] | None,
    known: Layout | None,
    named: int | None,
) -> int:
    """Return the axis along which a weight is divided into blocks of a kind.

    It is the innermost in axis whose size the block divides. The rows of a table that is looked up
    are whole: its blocks lie along the embed axis, as suits the head that a tied table is too.

    Args:
      path: of the weight.
      w: the weight.
      kind: a name in `WRITABLE`.
      uses: what the function does with the weight, or None without a function.
      known: the layout of its adapter, or None.
      named: the axis that the user chose, or None.

    Raises:
      LayoutError: nothing says which axes are in axes.
      TargetError: the function contracts the weight with nothing.
      ConfigError: blocks divide no in axis, or not the part of it that a device has; or the codes
        are not smaller than the weight.
    """
    ndim = len(w.shape)
    if named is None:
        candidates = _in_axes(path, w, uses, known)[::-1]
    elif -ndim <= named < ndim:
        candidates = (named % ndim,)
    else:
        raise ConfigError(f"{path}: axis {named} of the blocks is not an axis of {tuple(w.shape)}")
    problems = {axis: _problem(w, kind, axis) for axis in candidates}
    found = next((axis for axis in candidates if problems[axis] is None), None)
    if found is not None:
        return found
    others = [
        name for name in WRITABLE if any(_problem(w, name, axis) is None for axis in candidates)
    ]
    other = f", or choose another kind for it: {' or '.join(others)}" if others else ""
    raise ConfigError(f"{path}: {problems[candidates[0]]}. Leave it out with exclude={other}")


def _problem(w: Any, kind: str, axis: int) -> str | None:
    """Return why a weight cannot have blocks of a kind along this axis; None if it can."""
    form, shape, size = KINDS[kind], tuple(w.shape), w.shape[axis]
    where = f"axis {axis} of {shape}"
    if not size or size % (form.block or size):
        return f"blocks of {form.block} ({kind}) do not divide {where}"
    sharding = named_sharding(w)
    if sharding is not None and not has_whole_blocks(form, shape, axis, sharding):
        return (
            f"blocks of {form.block} ({kind}) do not divide the part of {where} that a device has, "
            f"sharded as {sharding.spec}"
        )
    bits = form.bits(size)
    if bits >= 8 * w.dtype.itemsize:
        return (
            f"it would take {bits:.4g} bits per number as {kind}, and has {8 * w.dtype.itemsize} "
            f"({where})"
        )
    return None


def _in_axes(
    path: str, w: Any, uses: Sequence[Use] | None, known: Layout | None
) -> tuple[int, ...]:
    """Return the axes of a weight that products sum over; of a table those within a row."""
    ndim = len(w.shape)
    if known is not None:
        is_table = "gather" in known.uses or (not known.uses and _is_named_table(path, ndim))
        return known.positions("o" if is_table else "i")
    if uses is None or layout_inference.is_opaque(uses):
        return (1,) if _is_named_table(path, ndim) else _from_shape(path, w.shape)
    lookups = [use for use in uses if use.primitive == "gather"]
    rows = layout_inference.layout_from_uses(ndim, lookups)
    if rows is not None:
        return rows.positions("o")
    layout = layout_inference.layout_from_uses(ndim, uses)
    if layout is None:
        raise TargetError(
            f"{path}: never contracted with an activation, so nothing says along which axis its "
            f"blocks lie. Leave it out with exclude=, or name the axis: {_axes(path)}"
        )
    return layout.positions("i")


def _is_named_table(path: str, ndim: int) -> bool:
    return ndim == 2 and LEAF.findall(path)[0] in EMBEDDING_NAMES


def _from_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return layout_inference.layout_from_shape(path, shape).positions("i")
    except LayoutError:
        raise LayoutError(
            f"{path}: the shape {tuple(shape)} alone does not show which axes are in. Pass the "
            f"function and its arguments, or name the axis of the blocks: {_axes(path)}"
        ) from None


def _axes(path: str) -> str:
    return f'axes={{"{path}": -2}}'
