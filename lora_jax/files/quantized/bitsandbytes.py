"""bitsandbytes' files: NF4 and FP4, with and without double quantization, and LLM.int8().

A weight of four bits is cut into blocks in the order of its numbers, so that a block may reach from
one row into the next. As bitsandbytes 0.50.2 writes them (`functional.QuantState.as_dict`).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.checks import is_number, is_size
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.quantized import nf4
from lora_jax.core.quantized.nf4_nested import dynamic_map
from lora_jax.core.quantized.tables import FP4_VALUES
from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.files.disk.strict_json import parse_json
from lora_jax.files.quantized.groups import SHORTEST
from lora_jax.files.quantized.packing import pack_blocks, unpack_nibbles
from lora_jax.files.quantized.stored import (
    INSTEAD,
    LazyArray,
    StoredCodes,
    bytes_of,
    dequantized,
    part,
)

#: quant_type -> our kind, and its table, which the file has too.
_KINDS = {"nf4": ("nf4_float32", nf4.VALUES), "fp4": ("fp4", FP4_VALUES)}
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = tuple(2**n for n in range(5, 13))
_DTYPES = ("float16", "bfloat16", "float32")


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    found: dict[str, Any] = {}
    parts: set[str] = set()
    for name in tensors:
        module = name.removesuffix(".weight")
        if f"{name}.absmax" in tensors:
            parts |= {f"{name}.{x}" for x in _PARTS} | {f"{name}{_STATE}{x}" for x in _KINDS}
            found[name] = _FourBits(tensors, name).stored()
        elif f"{module}.SCB" in tensors and name != module:
            parts |= {f"{module}.SCB", f"{module}.weight_format"}
            found[name] = _eight_bits(tensors, name, dtype)
    return {name: x for name, x in tensors.items() if name not in parts} | found


def _eight_bits(tensors: Mapping[str, Any], name: str, dtype: Any) -> StoredCodes:
    """Return a weight of LLM.int8(): `SCB` is the largest number of each output."""
    weight = part(tensors, name, (-1, -1), "int8")
    out, dtype = weight.shape[0], dtype or np.dtype(np.float16)
    largest = part(tensors, name.removesuffix("weight") + "SCB", (out,), "float32")

    def scales() -> np.ndarray:
        return np.asarray(largest)[:, None] * np.float32(1 / 127)

    fields = {"codes": weight, "scales": LazyArray((out, 1), np.dtype(np.float32), scales)}
    return StoredCodes(
        name, weight.shape, dtype, lambda: QuantizedWeight(fields, "int8", -1, dtype)
    )


class _FourBits:
    """A weight of four bits, and what its file says about it."""

    def __init__(self, tensors: Mapping[str, Any], name: str) -> None:
        self.tensors, self.name = tensors, name
        states = [x for x in _KINDS if f"{name}{_STATE}{x}" in tensors]
        if len(states) != 1:
            raise ModelFileError(f"{shown(name)}: has no quant_state of {' or '.join(_KINDS)}")
        source = f"{name}{_STATE}{states[0]}"
        stored = np.asarray(part(tensors, source, (-1,), "uint8"))
        state = parse_json(stored.tobytes(), shown(source), ModelFileError)
        if not isinstance(state, dict):
            raise ModelFileError(f"{shown(source)}: is not a JSON object")
        self.state, self.source = state, source
        self.kind, self.table = _KINDS[states[0]]
        self.shape = tuple(self._get("shape", _is_shape))
        self.block = self._get("blocksize", lambda x: x in _BLOCKS)
        self.dtype = jnp.dtype(self._get("dtype", lambda x: x in _DTYPES))
        self.count = math.prod(self.shape)
        if bytes_of(tensors[name]) != -(-self.count // 2):
            raise ModelFileError(
                f"{shown(name)}: has {bytes_of(tensors[name])} bytes, but its quant_state says "
                f"shape {list(self.shape)}, which needs {-(-self.count // 2)}"
            )
        self.blocks = -(-self.count // self.block)
        self.nested = f"{name}.nested_absmax" in tensors
        part(tensors, f"{name}.absmax", (self.blocks,), "uint8" if self.nested else "float32")

    def _get(self, key: str, is_valid: Any) -> Any:
        value = self.state.get(key)
        if not is_valid(value):
            raise ModelFileError(f"{shown(self.source)}: invalid {key} {shown_value(value)}")
        return value

    def stored(self) -> StoredCodes:
        """Return the weight."""
        return StoredCodes(self.name, self.shape, self.dtype, self.keep, self.values)

    def keep(self) -> QuantizedWeight:
        """Return codes whose blocks end where a row does; a block of the file may be several."""
        size = self.shape[-1]
        if per_row := self._scales_per_nested():
            return self._keep_nested(per_row)
        block = math.gcd(size, self.block)
        if block < SHORTEST:
            raise ModelFileError(
                f"{shown(self.name)}: blocks of {self.block} numbers and rows of {size} share only "
                f"blocks of {block}: {INSTEAD}"
            )
        per_block = (*self.shape[:-1], size // block)

        def codes() -> np.ndarray:
            return pack_blocks(self._codes().reshape(self.shape), block)

        def scales() -> np.ndarray:
            pieces = np.repeat(self._absmax(), self.block // block)
            return pieces[: math.prod(per_block)].reshape(per_block)

        return self._weight(codes, scales, (*self.shape[:-1], size // 2), per_block)

    def _scales_per_nested(self) -> int:
        """Return how many neighbouring scales of a row share a nested one; 0 for too few.

        A row then has a scale per 64 numbers: a longer block of the file gives several.
        """
        size = self.shape[-1]
        if not self.nested or self.kind != "nf4_float32" or size % nf4.BLOCK:
            return 0
        if self.block % nf4.BLOCK or not np.array_equal(self._nested_map(), dynamic_map()):
            return 0
        count = self._get("nested_blocksize", is_size) * self.block // nf4.BLOCK
        found = math.gcd(size // nf4.BLOCK, count)
        return found if found >= SHORTEST else 0

    def _keep_nested(self, per_nested: int) -> QuantizedWeight:
        """Return codes with the scales of the file: 8-bit codes, and their own scales."""
        rows, size = self.shape[:-1], self.shape[-1]
        scales = (*rows, size // nf4.BLOCK)
        nested = (*rows, scales[-1] // per_nested)
        pieces = self.block // nf4.BLOCK

        def codes() -> np.ndarray:
            return pack_blocks(self._codes().reshape(self.shape), nf4.BLOCK)

        def scale_codes() -> np.ndarray:
            found = np.asarray(self.tensors[f"{self.name}.absmax"])
            return np.repeat(found, pieces)[: math.prod(scales)].reshape(scales)

        def nested_scales() -> np.ndarray:
            of_scale = np.arange(0, math.prod(scales), per_nested) // pieces
            at = of_scale // self._get("nested_blocksize", is_size)
            return self._nested_absmax()[at].reshape(nested)

        def offset() -> np.ndarray:
            return np.full((*rows, 1), self._offset(), np.float32)

        byte, wide = np.dtype(np.uint8), np.dtype(np.float32)
        fields = {
            "codes": LazyArray((*rows, size // 2), byte, codes),
            "scales": LazyArray(scales, byte, scale_codes),
            "nested": LazyArray(nested, wide, nested_scales),
            "offset": LazyArray((*rows, 1), wide, offset),
        }
        return QuantizedWeight(fields, "nf4_nested", -1, self.dtype)

    def values(self) -> np.ndarray:
        """Return the values, of one row with blocks as in the file."""
        padded = self.blocks * self.block

        def codes() -> np.ndarray:
            found = self._codes()
            return pack_blocks(np.pad(found, (0, padded - found.size)), self.block)

        row = self._weight(codes, self._absmax, (padded // 2,), (self.blocks,))
        return dequantized(row)[: self.count].reshape(self.shape)

    def _weight(self, codes: Any, scales: Any, *shapes: tuple[int, ...]) -> QuantizedWeight:
        fields = {
            "codes": LazyArray(shapes[0], np.dtype(np.uint8), codes),
            "scales": LazyArray(shapes[1], np.dtype(np.float32), scales),
        }
        return QuantizedWeight(fields, self.kind, -1, self.dtype)

    def _codes(self) -> np.ndarray:
        """Return the codes in their order; a file may call its bytes by another dtype."""
        self._check_table()
        packed = np.asarray(self.tensors[self.name]).reshape(-1).view(np.uint8)
        return unpack_nibbles(packed, high_first=True)[: self.count]

    def _check_table(self) -> None:
        table = np.asarray(part(self.tensors, f"{self.name}.quant_map", (16,), "float32"))
        if not np.allclose(table, np.asarray(self.table, np.float32), rtol=0, atol=1e-6):
            raise ModelFileError(
                f"{shown(self.name)}.quant_map: is not the table of {self.kind.split('_')[0]}"
            )

    def _absmax(self) -> np.ndarray:
        """Return the largest number of each block of the file."""
        absmax = np.asarray(self.tensors[f"{self.name}.absmax"])
        if not self.nested:
            return absmax
        block = self._get("nested_blocksize", is_size)
        largest = self._nested_absmax()[np.arange(self.blocks) // block]
        return self._nested_map()[absmax] * largest + self._offset()

    def _nested_absmax(self) -> np.ndarray:
        count = -(-self.blocks // self._get("nested_blocksize", is_size))
        return np.asarray(part(self.tensors, f"{self.name}.nested_absmax", (count,), "float32"))

    def _nested_map(self) -> np.ndarray:
        return np.asarray(part(self.tensors, f"{self.name}.nested_quant_map", (256,), "float32"))

    def _offset(self) -> np.float32:
        return np.float32(self._get("nested_offset", is_number))


def _is_shape(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 1 and all(map(is_size, x))
