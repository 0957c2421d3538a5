"""Our own format of quantized weights in a model's directory: every kind, array by array.

Beside the other tensors, model.safetensors has "NAME.codes", "NAME.scales", ... for a weight NAME:
the fields of its `QuantizedWeight`, with PyTorch's axes. `quantization_config` in config.json says
of each weight its kind, the axis of its blocks (negative) and the dtype that it stands for:

    {"quant_method": "lora_jax", "version": 1, "weights": {NAME: {"kind", "axis", "dtype"}}}
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.quantized.stored import StoredCodes

METHOD, VERSION = "lora_jax", 1
CONFIG = "quantization_config"  # of config.json

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def config_of(weights: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """Return `quantization_config` for quantized weights with PyTorch's names and axes."""
    described = {
        name: {"kind": w.kind, "axis": w.axis, "dtype": str(jnp.dtype(w.dtype))}
        for name, w in weights.items()
    }
    return {"quant_method": METHOD, "version": VERSION, "weights": described}


def parts_of(weights: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """Return the arrays of quantized weights by the names that they have in the file."""
    return {f"{name}.{field}": x for name, w in weights.items() for field, x in w.fields.items()}


def read(
    tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any = None
) -> dict[str, Any]:
    """Return the tensors by the names of the float model's, with a `StoredCodes` for each weight.

    Args:
      tensors: of the file, read by `np.asarray`.
      config: from `config_of`.
      dtype: is not needed, because `config` has those of all weights.

    Raises:
      ModelFileError: the version or a kind is unknown, or parts are missing or of another shape or
        dtype; all are listed.
    """
    weights = config.get("weights")
    if config.get("version") != VERSION or not isinstance(weights, dict):
        raise ModelFileError(
            f"{CONFIG}: version {shown_value(config.get('version'))} of our own format, but this "
            f"release reads version {VERSION}"
        )
    found, problems, parts = {}, [], set[str]()
    for name, described in weights.items():
        try:
            found[name], own = _weight(tensors, name, described)
            parts |= own
        except ModelFileError as error:
            problems.append(f"{shown(name)}: {error}")
    if problems:
        raise ModelFileError(f"{CONFIG}:\n" + "\n".join(problems))
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return {**rest, **found}


def _weight(tensors: Mapping[str, Any], name: str, described: Any) -> tuple[StoredCodes, set[str]]:
    """Return a weight, and the names of its parts."""
    kind, axis, dtype = _parse(described)
    names = {field: f"{name}.{field}" for field in KINDS[kind].fields}
    if missing := [part for part in names.values() if part not in tensors]:
        raise ModelFileError(f"lacks {shown(', '.join(missing))}")
    fields = {field: tensors[part] for field, part in names.items()}
    weight = QuantizedWeight(fields, kind, axis, dtype)
    _check(weight)
    return StoredCodes(name, weight.shape, dtype, lambda: weight), set(names.values())


def _parse(described: Any) -> tuple[str, int, Any]:
    expected = {"kind", "axis", "dtype"}
    if not isinstance(described, dict) or described.keys() != expected:
        raise ModelFileError(f"{shown_value(described)} must have {', '.join(sorted(expected))}")
    kind, axis, dtype = described["kind"], described["axis"], described["dtype"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelFileError(f"kind {shown_value(kind)} is not one of {', '.join(KINDS)}")
    if not is_integer(axis) or axis >= 0:
        raise ModelFileError(f"axis {shown_value(axis)} must be negative")
    if dtype not in _DTYPES:
        raise ModelFileError(f"dtype {shown_value(dtype)} is not one of {', '.join(_DTYPES)}")
    return kind, axis, np.dtype(jnp.dtype(dtype))


def _check(weight: QuantizedWeight) -> None:
    """Raise `ModelFileError` if the arrays of a weight do not belong together."""
    form = weight.format
    if weight.axis < -len(weight.fields[form.codes].shape):
        raise ModelFileError(f"axis {weight.axis} is not an axis of its codes")
    shape, wrong = weight.shape, []
    blocks = weight.block and shape[weight.axis] % weight.block == 0
    for name, field in form.fields.items():
        x = weight.fields[name]
        want = list(shape)
        want[weight.axis] = field.entries(shape[weight.axis], weight.block) if blocks else 0
        is_same = jnp.issubdtype(x.dtype, jnp.floating) == jnp.issubdtype(field.dtype, jnp.floating)
        is_same &= jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == field.dtype
        if list(x.shape) != want or not is_same:
            wrong.append(
                f"{name} is {x.dtype} {list(x.shape)}, not {jnp.dtype(field.dtype)} {want}"
            )
    if wrong:
        raise ModelFileError(f"of the kind {weight.kind}: {'; '.join(wrong)}")
