"""The record of each node in a native adapter file, and the checks before it becomes a node."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LayoutError
from lora_jax.core.layout import Layout
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows

#: The tensors of each kind of node.
FIELDS = {
    "lora": ("a", "b", "scale"),
    "dora": ("a", "b", "scale", "magnitude"),
    "whole": ("value", "scale"),
    "rows": ("value", "scale"),
}


def kind(node: Adapted) -> str:
    """Return the key of `FIELDS` for a node."""
    if isinstance(node, TrainedLeaf | TrainedRows):
        return "whole" if isinstance(node, TrainedLeaf) else "rows"
    return "lora" if node.magnitude is None else "dora"


def record(node: Adapted) -> dict[str, Any]:
    """Return a node without its tensors, as JSON values."""
    if isinstance(node, TrainedLeaf):
        return {"kind": "whole"}
    layout = node.layout
    common: dict[str, Any] = {"kind": kind(node), "axes": layout.axes, "uses": list(layout.uses)}
    common |= {"lookup_only": True} if layout.lookup_only else {}
    if isinstance(node, TrainedRows):
        return common | {"rows": list(node.rows), "axis": node.axis}
    return common | ({"dropout": node.dropout} if node.dropout else {})


def make(record: Mapping[str, Any], arrays: Mapping[str, Any]) -> Adapted:
    """Make the node of a record and tensors in which no problems were found."""
    if record["kind"] == "whole":
        return TrainedLeaf(None, **arrays)
    layout = Layout(record["axes"], tuple(record["uses"]), record.get("lookup_only", False))
    if record["kind"] == "rows":
        axis = _axis_of_rows(record)
        return TrainedRows(None, **arrays, rows=tuple(record["rows"]), axis=axis, layout=layout)
    return LoraWeight(None, **arrays, layout=layout, dropout=float(record.get("dropout", 0.0)))


def record_problems(record: Any) -> list[str]:
    """List what is wrong with the JSON record of a node; any value may be of any type."""
    found = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(found, str) or found not in FIELDS:
        return [f"unknown kind of adapter {found!r:.40}"]
    if found == "whole":
        return []
    problems = _layout_problems(record.get("axes"))
    if found == "rows" and not problems:
        problems += _axis_problems(record)
    uses = record.get("uses")
    if not isinstance(uses, list) or not all(isinstance(use, str) for use in uses):
        problems.append(f"uses must be a list of names, not {uses!r:.40}")
    if type(record.get("lookup_only", False)) is not bool:
        problems.append(f"lookup_only must be true or false, not {record['lookup_only']!r:.40}")
    if found == "rows" and not _are_rows(record.get("rows")):
        problems.append(f"rows must be distinct numbers >= 0, not {record.get('rows')!r:.40}")
    if found != "rows" and not _is_probability(record.get("dropout", 0.0)):
        problems.append(f"dropout must be >= 0 and < 1, not {record['dropout']!r:.40}")
    return problems


def _axis_of_rows(record: Mapping[str, Any]) -> Any:
    """Return the axis along which the rows lie; older files leave it to the one in axis."""
    return record.get("axis", record["axes"].index("i"))


def _axis_problems(record: Mapping[str, Any]) -> list[str]:
    axes, axis = record["axes"], _axis_of_rows(record)
    if "axis" not in record and axes.count("i") != 1:
        return [f"without an axis, rows need a layout with one in axis, not {axes!r:.40}"]
    if type(axis) is not int or not 0 <= axis < len(axes) or axes[axis] == "b":
        return [f"axis must be the number of an in or out axis of {axes!r:.40}, not {axis!r:.40}"]
    return []


def _layout_problems(axes: Any) -> list[str]:
    if not isinstance(axes, str):
        return [f"axes must be a string of letters, not {axes!r:.40}"]
    try:
        Layout(axes)
    except LayoutError as error:
        return [str(error)]
    return []


def _are_rows(rows: Any) -> bool:
    numbers = isinstance(rows, list) and all(type(n) is int and 0 <= n < 2**31 for n in rows)
    return numbers and bool(rows) and len(set(rows)) == len(rows)


def _is_probability(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1


def array_problems(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """List what is wrong with a node's tensors, except what `check_fits` compares with the base."""
    problems = []
    for field, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"{field} is {x.dtype}, not floating-point")
    if "a" in arrays:
        return problems + _factor_problems(Layout(record["axes"]), arrays["a"], arrays["b"])
    value, scale = arrays["value"].shape, arrays["scale"].shape
    ones = (*value[:1], *(1 for _ in value[1:]))
    if scale != () and not (record["kind"] == "whole" and scale == ones):
        problems.append(f"scale has shape {scale}, which does not fit the value's {value}")
    return problems


def dtype_problems(node: Adapted) -> list[str]:
    """Return which of a node's arrays JAX would narrow to 32 bits."""
    arrays = {field: getattr(node, field) for field in FIELDS[kind(node)]}
    return [
        f"{field} is {x.dtype}, which JAX supports only with jax_enable_x64"
        for field, x in arrays.items()
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
    ]


def _factor_problems(layout: Layout, a: np.ndarray, b: np.ndarray) -> list[str]:
    problems = []
    for name, x, kinds in (("a", a, "bi"), ("b", b, "bo")):
        needed = len(layout.positions(kinds)) + 1
        if x.ndim != needed:
            problems.append(f"{name} has {x.ndim} axes, but layout {layout.axes!r} needs {needed}")
    return problems or (["the rank is 0"] if a.shape[-1] == 0 else [])
