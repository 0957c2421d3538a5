"""Arrays of the package qwix as `QuantizedWeight`s, without importing it."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.abstract import on_shapes
from lora_jax.core.boxes import opened
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.core.paths import path_str
from lora_jax.core.quantized import fp8, mxfp4
from lora_jax.core.quantized.bits import pack_nibbles
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized

#: Bits that a `qtype` needs here, and the kind of a `qtype` of floating numbers.
_INTEGERS = {**dict.fromkeys(("int2", "int3", "int4"), 4)} | dict.fromkeys(
    ("int5", "int6", "int7", "int8"), 8
)
_FLOATS = {
    **{"nf4": "nf4_float32", "float8_e4m3fn": "fp8", "mxfp8": "fp8"},
    **{"mxfp4": "mxfp4", "nvfp4": "nvfp4"},
}


def from_qwix(params: Any) -> Any:
    """Replace each `qwix.QArray` by a `QuantizedWeight` with the same values.

    The tree is what `qwix.quantize_params` returns, or one with the results of `qwix.quantize`; a
    `WithAux` is replaced too. Codes move as they are, and so do scales; a scale that several
    blocks share along another axis is repeated. The dtype of a weight is that of its scale, as in
    qwix. Where that is float32 the values are those of `qwix.dequantize` to the bit; for NF4 with
    narrower scales qwix rounds its table first.

    Args:
      params: any pytree; a `ShapeDtypeStruct` in the place of an array gives shapes.

    Returns:
      The tree; all other leaves are the same objects.

    Raises:
      ConfigError: a `qtype` is of another format than NF4, MXFP4, NVFP4, FP8 (e4m3) and int2 to
        int8; or a `QArray` is not consistent, or has 4-bit codes in blocks of an odd size.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_whole)
    return jax.tree.unflatten(treedef, [_replaced(path_str(path), x) for path, x in leaves])


def refuse_qarrays(caller: str, params: Any, chosen: Iterable[str]) -> None:
    """Raise if a chosen leaf is the codes or scales of a `QArray`, which alone mean nothing.

    Raises:
      ConfigError: one is; the message names the array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_whole)
    arrays = [path_str(path) for path, x in leaves if _is_whole(x) and not is_quantized(x)]
    for path in arrays:
        if any(one.startswith(f"{path}/") for one in chosen):
            raise ConfigError(
                f"{caller}: {path} is a QArray of qwix: pass lora_jax.from_qwix(params) in the "
                "place of params"
            )


def _is_whole(x: Any) -> bool:
    return is_quantized(x) or _is_of_qwix(x, "QArray") or _is_of_qwix(x, "WithAux")


def _is_of_qwix(x: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.split(".")[0] == "qwix" for c in type(x).__mro__)


def _replaced(path: str, x: Any) -> Any:
    if _is_of_qwix(x, "WithAux"):
        x = opened(x.array)[0]
    return _weight(path, x) if _is_of_qwix(x, "QArray") else x


def _weight(path: str, array: Any) -> QuantizedWeight:
    qvalue, scale = opened(array.qvalue)[0], opened(array.scale)[0]
    zero = None if array.zero_point is None else opened(array.zero_point)[0]
    qtype = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    axis, blocks = _blocks(path, qvalue, [x for x in (scale, zero) if x is not None])
    is_odd = qvalue.shape[axis] // blocks % 2 == 1
    width = 8 if is_odd else _INTEGERS.get(qtype)
    if qtype in _INTEGERS:
        kind = f"int{width}" if zero is None else f"int{width}_zero"
    else:
        kind = _FLOATS.get(qtype, "")
    if not kind or (qtype in _FLOATS and zero is not None):
        what = "a zero point" if kind else f"qtype {shown_value(qtype)}"
        raise ConfigError(
            f"from_qwix: {path}: {what} of a QArray has no kind here, only "
            f"{', '.join(_FLOATS)} and {', '.join(_INTEGERS)}; use qwix.dequantize for this weight"
        )
    if is_odd and kind not in ("fp8", "int8", "int8_zero"):
        raise ConfigError(
            f"from_qwix: {path}: 4-bit codes are packed in pairs, but a block has "
            f"{qvalue.shape[axis] // blocks}; use qwix.dequantize for this weight"
        )
    fields = on_shapes(
        functools.partial(_fields, kind=kind, axis=axis, blocks=blocks), qvalue, scale, zero
    )
    if kind in ("mxfp4", "nvfp4"):
        _check_scales(path, kind, scale, fields["scales"])
    return QuantizedWeight(fields, kind, axis, jnp.dtype(scale.dtype))


def _check_scales(path: str, kind: str, scale: Any, codes: Any) -> None:
    """Raise unless 8 bits say what the scales of a 4-bit floating format are."""
    if isinstance(codes, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    meant = mxfp4.powers_of_two(codes) if kind == "mxfp4" else fp8.numbers(codes)
    if not np.isin(np.asarray(scale, np.float32), np.asarray(meant)).all():
        what = "powers of two" if kind == "mxfp4" else "FP8 numbers (e4m3)"
        raise ConfigError(f"from_qwix: {path}: the scales of {kind} should be {what}")


def _blocks(path: str, qvalue: Any, others: list[Any]) -> tuple[int, int]:
    """Return the axis of the blocks, counted from the end, and their number along it."""
    shape = qvalue.shape
    if any(
        len(x.shape) != len(shape) or any(n % m for n, m in zip(shape, x.shape, strict=True))
        for x in others
    ):
        found = " and ".join(str(list(x.shape)) for x in others)
        raise ConfigError(
            f"from_qwix: {path}: a scale or zero point {found} does not divide the shape "
            f"{list(shape)} of the codes"
        )
    counts = [math.lcm(*(x.shape[i] for x in others)) for i in range(len(shape))]
    # tiles before whole axes, and longer axes before shorter ones: along the other axes with
    # several numbers per scale, scales are repeated
    order = lambda i: (counts[i] < shape[i], 1 < counts[i] < shape[i], shape[i])
    at = max(range(len(shape)), key=order)
    return at - len(shape), counts[at]


@functools.partial(jax.jit, static_argnames=("kind", "axis", "blocks"))
def _fields(
    qvalue: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    kind: str,
    axis: int,
    blocks: int,
) -> dict[str, jax.Array]:
    """Return the fields of a kind."""
    sizes = list(qvalue.shape)
    sizes[axis] = blocks
    fields = {"codes": _codes(qvalue, kind, axis, blocks), "scales": _spread(scale, sizes)}
    if zero is not None:
        fields["zeros"] = _unsigned(_spread(zero, sizes), kind)
    if kind in ("nf4_float32", "fp8"):
        fields["scales"] = fields["scales"].astype(jnp.float32)
    elif kind == "mxfp4":
        bits = lax.bitcast_convert_type(fields["scales"].astype(jnp.float32), jnp.int32)
        fields["scales"] = (bits >> 23).astype(jnp.uint8)
    elif kind == "nvfp4":
        fields["scales"] = fp8.codes(fields["scales"].astype(jnp.float32))
        sizes[axis] = 1
        fields["divisor"] = jnp.ones(sizes, jnp.float32)
    return fields


def _spread(x: jax.Array, sizes: list[int]) -> jax.Array:
    for axis, size in enumerate(sizes):
        x = jnp.repeat(x, size // x.shape[axis], axis) if x.shape[axis] != size else x
    return x


def _codes(qvalue: jax.Array, kind: str, axis: int, blocks: int) -> jax.Array:
    if kind == "int8":
        return qvalue.astype(jnp.int8)
    if kind == "int8_zero":
        return _unsigned(qvalue, kind)
    if kind == "fp8":
        return lax.bitcast_convert_type(qvalue, jnp.uint8)
    if kind in ("mxfp4", "nvfp4"):
        codes = lax.bitcast_convert_type(qvalue, jnp.uint4).astype(jnp.uint8)
    elif kind == "nf4_float32":
        codes = qvalue.astype(jnp.uint8)
    else:
        codes = _unsigned(qvalue, kind)
    at = axis % qvalue.ndim
    before, after = qvalue.shape[:at], qvalue.shape[at + 1 :]
    split = codes.reshape(*before, blocks, qvalue.shape[at] // blocks, *after)
    return pack_nibbles(split, axis).reshape(*before, qvalue.shape[at] // 2, *after)


def _unsigned(x: jax.Array, kind: str) -> jax.Array:
    """Return signed integers as codes from zero."""
    middle = 8 if kind.startswith("int4") else 128
    return (x.astype(jnp.int16) + middle).astype(jnp.uint8)
