"""Weights in FP8 (e4m3) with a scale for all of them, per output, per group or per square block.

transformers' FineGrainedFP8Config, with blocks of 128 by 128, calls the scales `weight_scale_inv`,
its FbgemmFp8Config calls them `weight_scale`, one per output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.quantized.scales import grid
from lora_jax.files.quantized.stored import LazyArray, StoredCodes, part

DTYPE = "float8_e4m3fn"
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_scale_ub")


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    found: dict[str, Any] = {}
    parts: set[str] = set()
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        scales = [f"{module}.{x}" for x in _SCALES if f"{module}.{x}" in tensors]
        if str(tensor.dtype) == DTYPE and name != module and scales:
            parts |= {*scales, *(f"{module}.{x}" for x in _OF_ACTIVATIONS)}
            square = config.get("weight_block_size")
            found[name] = stored_fp8(tensors, name, scales[0], square, dtype)
    return {name: x for name, x in tensors.items() if name not in parts} | found


def stored_fp8(
    tensors: Mapping[str, Any], name: str, scale: str, square: Sequence[int] | None, dtype: Any
) -> StoredCodes:
    """Return a weight `[out, in]` in FP8.

    Args:
      tensors: of the file.
      name: of the weight.
      scale: the name of its scales.
      square: as in `scales.grid`.
      dtype: of the weight.
    """
    weight = part(tensors, name, (-1, -1), DTYPE)
    where = grid(tensors, scale, weight.shape, square)
    fields = {
        "codes": LazyArray(
            weight.shape, np.dtype(np.uint8), lambda: np.asarray(weight).view(np.uint8)
        ),
        "scales": where.spread(tensors[scale], np.dtype(np.float32)),
    }
    dtype = dtype or np.dtype(ml_dtypes.bfloat16)
    return StoredCodes(name, weight.shape, dtype, lambda: QuantizedWeight(fields, "fp8", -1, dtype))
