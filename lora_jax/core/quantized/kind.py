"""`Kind`: a format of quantized numbers, as the arrays that hold it and two functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

#: Arrays of a weight by name.
Fields = Mapping[str, jax.Array]

#: `decode(fields, axis)` and `encode(blocks, axis)`: see `Kind`.
Decode = Callable[[Fields, int], jax.Array]
Encode = Callable[[jax.Array, int], dict[str, jax.Array]]


@dataclass(frozen=True)
class Field:
    """An array of a quantized weight: it has the weight's axes, the blocked one shorter.

    Attributes:
      dtype: of the array that `quantize` makes; scales from a file keep the file's dtype.
      per_weight: entries per number of the weight, such as 1/2 for packed 4-bit codes; None for one
        entry per block, 0 for one entry per index of the other axes.
    """

    dtype: Any
    per_weight: Fraction | int | None

    def entries(self, size: int, block: int) -> int:
        """Return the length of the array along the blocked axis, for a weight of this size."""
        if self.per_weight is None:
            return size // block
        return max(1, int(size * self.per_weight))


@dataclass(frozen=True)
class Kind:
    """A format: which arrays hold the numbers of a weight, and how to read and write them.

    A weight is divided along one axis into blocks. `decode` and `encode` see that axis as two,
    `[..., blocks, block, ...]`, and the second of them is `axis`, counted from the end (a field
    with one entry per index of the other axes has size 1 along both).

    Attributes:
      name: as in `lora.quantize(params, name)`.
      fields: the arrays by name. The first has the codes, and so shows the size of the weight.
      block: numbers per block as `quantize` makes them; None where the block is the whole axis. A
        weight from a file may have other blocks: where a field has one entry per block, it is that
        field's size which counts.
      decode: `decode(fields, axis)` returns float32 values.
      encode: `encode(values, axis)` returns the fields of float32 values; None where files of this
        kind can be read but not written.
      bits: per number, without what does not grow with the block axis.
      source: where the format is defined.
    """

    name: str
    fields: Mapping[str, Field]
    block: int | None
    decode: Decode
    encode: Encode | None
    source: str

    @property
    def codes(self) -> str:
        """The name of the field with the codes."""
        return next(iter(self.fields))

    @property
    def per_block(self) -> str | None:
        """The name of the first field with one entry per block, or None."""
        return next((x for x, field in self.fields.items() if field.per_weight is None), None)

    def size(self, entries: int) -> int:
        """Return the size of the blocked axis of a weight whose codes have so many entries."""
        per_weight = self.fields[self.codes].per_weight
        assert per_weight  # codes are neither one per block nor one per axis
        return int(entries / per_weight)

    def bits(self, size: int) -> float:
        """Return the bits per number of a weight whose blocked axis has this size."""
        block = self.block or size
        return sum(
            8 * jnp.dtype(field.dtype).itemsize * field.entries(size, block) / size
            for field in self.fields.values()
        )
