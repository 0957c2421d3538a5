"""gpt-oss' files: the weights of experts in MXFP4, `*_blocks` and `*_scales`.

The file has `[experts, out, groups of inputs, 16 bytes]`; the weight is `[experts, in, out]`, as
in transformers' `GptOssExperts`.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.quantized.packing import pack_blocks, unpack_nibbles
from lora_jax.files.quantized.stored import LazyArray, StoredCodes, part, replace_parts

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    make = lambda name: _weight(tensors, name, dtype)
    return replace_parts(tensors, (_BLOCKS, _SCALES), "", make)


def _weight(tensors: Mapping[str, Any], name: str, dtype: Any) -> StoredCodes:
    blocks = part(tensors, name + _BLOCKS, (-1, -1, -1, _BLOCK // 2), "uint8")
    experts, out, groups, _ = blocks.shape
    scales = part(tensors, name + _SCALES, (experts, out, groups), "uint8")

    def codes() -> np.ndarray:
        found = pack_blocks(unpack_nibbles(np.asarray(blocks)), _BLOCK)
        return found.reshape(experts, out, groups * _BLOCK // 2).swapaxes(1, 2)

    byte = np.dtype(np.uint8)
    fields = {
        "codes": LazyArray((experts, groups * _BLOCK // 2, out), byte, codes),
        "scales": LazyArray(
            (experts, groups, out), byte, lambda: np.asarray(scales).swapaxes(1, 2)
        ),
    }
    dtype = dtype or np.dtype(ml_dtypes.bfloat16)
    shape = (experts, groups * _BLOCK, out)
    return StoredCodes(name, shape, dtype, lambda: QuantizedWeight(fields, "mxfp4", -2, dtype))
