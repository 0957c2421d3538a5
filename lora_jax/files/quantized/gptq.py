"""GPTQ's files: `qweight` packed along the inputs, `qzeros`, `scales` and `g_idx`.

As GPTQModel 7.7.0 and AutoGPTQ 0.7 write and read them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.quantized.groups import Groups, irregular, regular
from lora_jax.files.quantized.integers import stored_integers
from lora_jax.files.quantized.packing import WORD, unpack_words
from lora_jax.files.quantized.stored import LazyArray, StoredCodes, part, replace_parts

_BITS = (2, 3, 4, 8)
#: Whether zero points are stored less one, by `checkpoint_format`.
_LESS_ONE = {"gptq": True, "gptq_v2": False}
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_FLOATS = "float16 bfloat16 float32"


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    bits = config.get("bits")
    if bits not in _BITS:
        raise ModelFileError(f"GPTQ: bits {shown_value(bits)} is not one of {list(_BITS)}")
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(layout, str) or layout not in _LESS_ONE:
        raise ModelFileError(
            f"GPTQ: checkpoint_format {shown_value(layout)} is not one of {list(_LESS_ONE)}; "
            "save the model in one of them"
        )
    make = lambda module: _weight(tensors, module, bits, config, _LESS_ONE[layout], dtype)
    return replace_parts(tensors, _PARTS, ".weight", make)


def _weight(
    tensors: Mapping[str, Any],
    module: str,
    bits: int,
    config: Mapping[str, Any],
    less_one: bool,
    dtype: Any,
) -> StoredCodes:
    words = part(tensors, f"{module}.qweight", (-1, -1), "int32")
    size, out = words.shape[0] * WORD // bits, words.shape[1]
    scales = part(tensors, f"{module}.scales", (-1, out), _FLOATS)
    count = scales.shape[0]
    zero_words = part(tensors, f"{module}.qzeros", (count, -(-out * bits // WORD)), "int32")
    given = config.get("group_size", -1)
    group = given if isinstance(given, int) and given > 0 else size

    def zeros() -> np.ndarray:
        return _zeros(np.asarray(zero_words), bits, less_one)[:, :out].T

    def groups() -> Groups:
        if f"{module}.g_idx" in tensors:
            found = np.asarray(part(tensors, f"{module}.g_idx", (size,), "int32 int64"))
            if found.min() < 0 or found.max() >= count:
                raise ModelFileError(f"{shown(module)}.g_idx: names groups beyond {count}")
            return irregular(found)
        if -(-size // group) != count:
            raise ModelFileError(
                f"{shown(module)}.scales: has {count} groups, but {size} inputs in groups of "
                f"{group} have {-(-size // group)}"
            )
        return regular(size, group)

    name = f"{module}.weight"
    codes = LazyArray(
        (out, size), np.dtype(np.uint8), lambda: unpack_words(np.asarray(words).T, bits)
    )
    per_group = LazyArray((out, count), scales.dtype, lambda: np.asarray(scales).T)
    zero_points = LazyArray((out, count), np.dtype(np.uint8), zeros)
    return stored_integers(name, codes, per_group, zero_points, bits, groups, dtype or scales.dtype)


def _zeros(words: np.ndarray, bits: int, less_one: bool) -> np.ndarray:
    """Return zero points `[groups, out]`; version 1 of the format stores them less one."""
    if not less_one:
        return unpack_words(words, bits)
    if WORD % bits:
        return (unpack_words(words, bits) + np.uint8(1)) & np.uint8(2**bits - 1)
    # whole words, as GPTQModel subtracts and adds: a borrow out of a zero point comes back
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    return unpack_words(words.view(np.uint32) + np.uint32(ones), bits)
