"""Short `repr`s: what an array or an adapted node is, in a few words and without its values."""

import dataclasses
from typing import Any

import jax
import numpy as np


def describe_array(x: Any) -> str:
    """Return dtype and shape of an array, or of what stands for one: a tracer, or a shape.

    >>> describe_array(np.zeros((4, 3), "float32"))
    'float32[4,3]'
    """
    return f"{x.dtype}{_shape(x)}"


def _shape(x: Any) -> str:
    return f"[{','.join(map(str, x.shape))}]"


def describe_value(x: Any) -> str:
    """Return the value of a concrete scalar, or what `x` is if it is another array.

    >>> describe_value(np.float32(0.1)), describe_value(np.zeros(3)), describe_value("train")
    ('0.1', 'float64[3]', "'train'")
    """
    if not is_array(x):
        return repr(x)
    return str(np.asarray(x)) if _is_concrete_scalar(x) else describe_array(x)


def describe_node(node: Any, shown: dict[str, str]) -> str:
    """Return "LoraWeight(float32[4,3], rank=2)": an adapted node by its weight, and what is shown.

    The weight of a node without a base, as in an overlay, is shown as "overlay[4,3]".
    """
    weight = f"overlay{_shape(node)}" if node.w is None else describe_array(node.w)
    details = (f"{name}={text}" for name, text in shown.items())
    return f"{type(node).__name__}({', '.join([weight, *details])})"


def describe_fields(node: Any) -> str:
    """Return "LoraWeight(w='freeze', a='train')": an adapted node by all fields that are set.

    This is for nodes whose fields are not the arrays of one weight: labels, masks, or adapters that
    are stacked to be mapped over.
    """
    values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    shown = (f"{name}={describe_value(x)}" for name, x in values.items() if x is not None)
    return f"{type(node).__name__}({', '.join(shown)})"


def has_arrays(node: Any, *names: str) -> bool:
    """Return whether these fields of a node are arrays, and its base is one or None."""
    base = node.w is None or is_array(node.w)
    return base and all(is_array(getattr(node, name)) for name in names)


def is_array(x: Any) -> bool:
    """Return whether `x` is an array or stands for one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_concrete_scalar(x: Any) -> bool:
    """Return whether the value of `x` is a number that can be read here."""
    if x.shape != () or isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        return False
    if not isinstance(x, jax.Array):
        return isinstance(x, np.ndarray | np.generic)
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return not is_key and x.is_fully_addressable and not x.is_deleted()
