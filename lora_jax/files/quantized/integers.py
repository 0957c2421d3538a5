"""Integer codes of a file as codes of a kind: with zero points or around zero."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.quantized.groups import Groups
from lora_jax.files.quantized.packing import pack_blocks
from lora_jax.files.quantized.stored import INSTEAD, LazyArray, StoredCodes, dequantized


def stored_integers(
    name: str,
    codes: LazyArray,
    scales: LazyArray,
    zeros: LazyArray | None,
    bits: int,
    groups: Callable[[], Groups],
    dtype: Any,
) -> StoredCodes:
    """Return a weight `[out, in]` whose values are `(code - zero) * scale`.

    Args:
      name: of the weight.
      codes: uint8 `[out, in]`, from 0 to `2**bits - 1`.
      scales: `[out, groups]`, of any floating dtype.
      zeros: uint8 `[out, groups]`; None where all are `2**(bits - 1)`.
      bits: at most 8; codes of 2 or 3 bits become codes of 4, and codes of 5 to 7 bits of 8.
      groups: returns which of the groups each input is in.
      dtype: of the weight.
    """

    def keep() -> QuantizedWeight:
        found = groups()
        if found.order is not None:
            raise ModelFileError(
                f"{shown(name)}: its inputs are in groups by their activations (desc_act, "
                f"actorder), so neighbours do not share a scale: {INSTEAD}"
            )
        if not found.kept:
            raise ModelFileError(
                f"{shown(name)}: its groups have only {found.block} neighbouring inputs in "
                f"common: {INSTEAD}"
            )
        width = 4 if bits <= 4 else 8
        return replace(_weight(codes, scales, zeros, bits, found, width), dtype=dtype)

    def values() -> np.ndarray:
        found = groups()
        wide = dequantized(_weight(codes, scales, zeros, bits, found, 8))
        if found.order is None:
            return wide
        sorted_by_input = np.empty_like(wide)
        sorted_by_input[:, found.order] = wide
        return sorted_by_input

    return StoredCodes(name, codes.shape, dtype, keep, values)


def _weight(
    codes: LazyArray,
    scales: LazyArray,
    zeros: LazyArray | None,
    bits: int,
    groups: Groups,
    width: int,
) -> QuantizedWeight:
    """Return codes of a kind of 4 or 8 bits, whose inputs are sorted by group."""
    out, size = codes.shape
    middle = 2 ** (bits - 1)

    def packed() -> np.ndarray:
        found = np.asarray(codes)
        found = found if groups.order is None else found[:, groups.order]
        if zeros is None and width == 8:
            return (found.astype(np.int16) - middle).astype(np.int8)
        found = found if zeros is not None else found + np.uint8(8 - middle)
        return pack_blocks(found, groups.block) if width == 4 else found

    def per_block(field: LazyArray) -> LazyArray:
        shape = (out, size // groups.block)
        return LazyArray(shape, field.dtype, lambda: np.asarray(field)[:, groups.index])

    dtype = np.int8 if zeros is None and width == 8 else np.uint8
    fields: dict[str, Any] = {
        "codes": LazyArray((out, size * width // 8), np.dtype(dtype), packed),
        "scales": per_block(scales),
    }
    if zeros is not None:
        fields["zeros"] = per_block(zeros)
    kind = f"int{width}" if zeros is None else f"int{width}_zero"
    return QuantizedWeight(fields, kind, -1, np.dtype(np.float32))
