"""compressed-tensors' files: integers packed in words or as they are, FP8, MXFP4 and NVFP4.

As version 0.20.0 writes them (`pack_quantized`, `naive_quantized`, `mxfp4` and `nvfp4` in its
`compressors`). Which of them a weight has is seen from its tensors, so a file may mix them. Scales
of activations are left out: here only weights are quantized.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.core.checks import is_size
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.quantized import fp8
from lora_jax.files.quantized.groups import Groups, irregular
from lora_jax.files.quantized.integers import stored_integers
from lora_jax.files.quantized.packing import WORD, pack_blocks, unpack_nibbles, unpack_words
from lora_jax.files.quantized.scales import grid
from lora_jax.files.quantized.stored import LazyArray, StoredCodes, part

_PARTS = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale"),
)
_BYTE = np.dtype(np.uint8)


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    scales = [name for name in tensors if name.endswith(".weight_scale")]
    modules = [name.removesuffix(".weight_scale") for name in scales]
    rest = {name: x for name, x in tensors.items() if name.rsplit(".", 1)[-1] not in _PARTS}
    return rest | {f"{m}.weight": _weight(tensors, m, config, dtype) for m in modules}


def _schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how the weights of each group of modules are quantized."""
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    found = [group.get("weights") for group in groups if isinstance(group, dict)]
    return [x for x in found if isinstance(x, dict)]


def _bits(config: Mapping[str, Any]) -> set[int]:
    found = {x.get("num_bits") for x in _schemes(config)}
    return {x for x in found if is_size(x) and x <= 8}


def _square(config: Mapping[str, Any]) -> Sequence[int] | None:
    """Return the height and width of square blocks, if there are any."""
    found = [x.get("block_structure") for x in _schemes(config) if x.get("strategy") == "block"]
    return found[0] if found else None


def _weight(
    tensors: Mapping[str, Any], module: str, config: Mapping[str, Any], dtype: Any
) -> StoredCodes:
    name, packed = f"{module}.weight", f"{module}.weight_packed"
    if packed in tensors:
        if str(tensors[packed].dtype) == "uint8":
            return _e2m1(tensors, module, dtype)
        return _packed(tensors, module, config, dtype)
    if name not in tensors:
        raise ModelFileError(f"{shown(name)}: missing, a part of a quantized weight")
    square = _square(config)
    if str(tensors[name].dtype) == fp8.DTYPE:
        return fp8.stored_fp8(tensors, name, f"{module}.weight_scale", square, dtype)
    weight = part(tensors, name, (-1, -1), "int8")
    zeros = tensors.get(f"{module}.weight_zero_point")
    if zeros is not None:
        zeros = _as_bytes(part(tensors, f"{name}_zero_point", (-1,) * len(zeros.shape), "int8"))
    return _integers(tensors, module, _as_bytes(weight), zeros, 8, dtype, square)


def _as_bytes(numbers: Any) -> LazyArray:
    """Return int8 numbers as codes from 0 to 255."""
    return LazyArray(
        numbers.shape, _BYTE, lambda: np.asarray(numbers).view(np.uint8) ^ np.uint8(128)
    )


def _packed(
    tensors: Mapping[str, Any], module: str, config: Mapping[str, Any], dtype: Any
) -> StoredCodes:
    """Return integers of 1 to 8 bits in words of 32."""
    name = f"{module}.weight_packed"
    words = part(tensors, name, (-1, -1), "int32")
    shape = part(tensors, f"{module}.weight_shape", (2,), "int64 int32")
    out, size = np.asarray(shape).tolist()
    fitting = {b for b in _bits(config) if size > 0 and -(-size * b // WORD) == words.shape[1]}
    if out != words.shape[0] or len(fitting) != 1:
        raise ModelFileError(
            f"{shown(name)}: words {list(words.shape)} are not a weight [{out}, {size}] with any "
            "num_bits of config_groups in config.json"
        )
    (bits,) = fitting
    codes = LazyArray((out, size), _BYTE, lambda: unpack_words(np.asarray(words), bits)[:, :size])
    zeros = None
    if f"{module}.weight_zero_point" in tensors:
        count = tensors[f"{module}.weight_scale"].shape[-1]
        rows = -(-out * bits // WORD)
        stored = part(tensors, f"{module}.weight_zero_point", (rows, count), "int32")
        zeros = LazyArray(
            (out, count), _BYTE, lambda: unpack_words(np.asarray(stored).T, bits)[:, :out].T
        )
    return _integers(tensors, module, codes, zeros, bits, dtype)


def _integers(
    tensors: Mapping[str, Any],
    module: str,
    codes: LazyArray,
    zeros: LazyArray | None,
    bits: int,
    dtype: Any,
    square: Sequence[int] | None = None,
) -> StoredCodes:
    """Return a weight of unsigned codes, and of zero points like its scales."""
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    where = grid(tensors, scale, codes.shape, square)
    scales = where.spread(tensors[scale])
    index = np.arange(where.groups.index.size)
    if zeros is not None and math.prod(zeros.shape) != math.prod(where.shape):
        raise ModelFileError(
            f"{shown(name)}_zero_point: has shape {list(zeros.shape)}, but the scales have "
            f"{list(where.shape)}"
        )

    def groups() -> Groups:
        if f"{name}_g_idx" in tensors:
            stored = part(tensors, f"{name}_g_idx", (codes.shape[1],), "int32 int64")
            group_of = np.asarray(stored)
            if group_of.max() >= where.shape[1]:
                raise ModelFileError(f"{shown(name)}_g_idx: names groups beyond {where.shape[1]}")
            if group_of.min() >= 0:  # -1 where the groups are in order
                return irregular(group_of)
        return Groups(where.groups.block, index)

    zeros = where.spread(zeros) if zeros is not None else None
    return stored_integers(name, codes, scales, zeros, bits, groups, dtype or scales.dtype)


def _e2m1(tensors: Mapping[str, Any], module: str, dtype: Any) -> StoredCodes:
    """Return MXFP4, or NVFP4 where there is a global scale, by which the others are divided."""
    packed = part(tensors, f"{module}.weight_packed", (-1, -1), "uint8")
    out, size = packed.shape[0], packed.shape[1] * 2
    kind = "nvfp4" if f"{module}.weight_global_scale" in tensors else "mxfp4"
    block = KINDS[kind].block or size
    stored = fp8.DTYPE if kind == "nvfp4" else "uint8"
    scales = part(tensors, f"{module}.weight_scale", (out, size // block), stored)

    def codes() -> np.ndarray:
        return pack_blocks(unpack_nibbles(np.asarray(packed)), block)

    def scale_codes() -> np.ndarray:
        return np.asarray(scales).view(np.uint8)

    def divisor() -> np.ndarray:
        return np.broadcast_to(np.asarray(divisors).reshape(1, 1), (out, 1))

    fields = {
        "codes": LazyArray(packed.shape, _BYTE, codes),
        "scales": LazyArray(scales.shape, _BYTE, scale_codes),
    }
    if kind == "nvfp4":
        divisors = part(tensors, f"{module}.weight_global_scale", (1,), "float32")
        fields["divisor"] = LazyArray((out, 1), np.dtype(np.float32), divisor)
    dtype = dtype or np.dtype(ml_dtypes.bfloat16)
    return StoredCodes(
        f"{module}.weight", (out, size), dtype, lambda: QuantizedWeight(fields, kind, -1, dtype)
    )
