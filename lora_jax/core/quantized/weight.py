"""`QuantizedWeight`: packed codes and scales in the place of a floating weight."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.host_memory import on_device
from lora_jax.core.not_an_array import NotAnArray
from lora_jax.core.quantized.kind import Kind
from lora_jax.core.quantized.kinds import KINDS, kind_named
from lora_jax.core.short_repr import describe_array, is_array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(NotAnArray):
    """Takes the place of a floating weight in a parameter tree, and means its dequantized values.

    It is a pytree node: its arrays are leaves, and the rest is static. Each array has the axes of
    the weight in their order, and is shorter along the one axis that is divided into blocks. That
    axis is counted from the end, so whatever slices or stacks leading axes (a scan over layers, a
    `vmap`, `jax.tree.map`) slices or stacks weights.

    >>> import jax.numpy as jnp
    >>> w = quantize_array(jnp.ones((64, 3)), "nf4", axis=0)
    >>> w.shape, w.dtype, w.fields["codes"].shape, w.dequantize()[0, 0]
    ((64, 3), dtype('float32'), (32, 3), Array(1., dtype=float32))
    """

    what, to_arrays = "a quantized weight", "dequantize"

    fields: Mapping[str, Any]  # the arrays of `KINDS[kind]` by name
    kind: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})  # of the blocks, negative
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the weight that it stands for

    @property
    def format(self) -> Kind:
        """The kind itself."""
        return KINDS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = list(self.fields[self.format.codes].shape)
        shape[self.axis] = self.format.size(shape[self.axis])
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.fields[self.format.codes].shape)

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Numbers per block."""
        size, per_block = self.shape[self.axis], self.format.per_block
        if per_block is None:
            return self.format.block or size
        return size // self.fields[per_block].shape[self.axis]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in self.fields.values())

    def dequantize(self, zero: jax.Array | None = None) -> jax.Array:
        """Return the values, computed in float32 and rounded once to `dtype`.

        `zero` is as in `dequantize_array`.
        """
        return dequantize_array(self, zero)

    def __repr__(self) -> str:
        if not all(map(is_array, self.fields.values())):
            return f"QuantizedWeight({self.kind}, {self.fields})"
        return f"QuantizedWeight({describe_array(self)}, {self.kind}, axis={self.axis})"


def is_quantized(x: Any) -> bool:
    """Return whether a node stands for a weight by its codes."""
    return isinstance(x, QuantizedWeight)


def dequantized(x: Any) -> Any:
    """Return the values of a quantized weight; anything else as it is."""
    return x.dequantize() if is_quantized(x) else x


def quantize_array(w: jax.Array, kind: str, axis: int, block: int | None = None) -> QuantizedWeight:
    """Return a floating array, quantized along an axis.

    Args:
      w: any floating array; it is read in float32.
      kind: a name in `KINDS` that can be written.
      axis: the axis that is divided into blocks.
      block: numbers per block; None for the kind's own.

    Raises:
      ConfigError: the kind is unknown or cannot be written, or its blocks do not divide the axis.
    """
    form = kind_named(kind)
    if form.encode is None:
        raise ConfigError(f"quantize: {kind} can be read from files, but not written")
    axis = axis % w.ndim - w.ndim
    size = w.shape[axis]
    block = block or form.block or size
    if size % block:
        raise ConfigError(
            f"quantize: blocks of {block} ({kind}) do not divide axis {axis} of {list(w.shape)}"
        )
    blocks = _split(w.astype(jnp.float32), axis, size // block)
    fields = {name: _join(x, axis) for name, x in form.encode(blocks, axis).items()}
    return QuantizedWeight(fields, kind, axis, w.dtype)


def dequantize_array(w: QuantizedWeight, zero: jax.Array | None = None) -> jax.Array:
    """Return the values of a weight, in its dtype.

    Args:
      w: the weight.
      zero: an integer scalar that is 0: the values then depend on what it was computed from, so
        that XLA cannot compute them earlier.
    """
    fields = {name: on_device(x) for name, x in w.fields.items()}
    if zero is not None:
        codes = fields[w.format.codes]
        fields[w.format.codes] = codes + zero.astype(codes.dtype)
    blocks = w.shape[w.axis] // w.block
    split = {
        name: _split(x, w.axis, blocks if w.format.fields[name].per_weight != 0 else 1)
        for name, x in fields.items()
    }
    return _join(w.format.decode(split, w.axis), w.axis).astype(w.dtype)


def _split(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """Return `[..., size, ...]` as `[..., blocks, size / blocks, ...]`."""
    at = axis % x.ndim
    return x.reshape(*x.shape[:at], blocks, x.shape[at] // blocks, *x.shape[at + 1 :])


def _join(x: jax.Array, axis: int) -> jax.Array:
    """Return `[..., blocks, size / blocks, ...]` as `[..., size, ...]`."""
    at = axis % x.ndim
    return x.reshape(*x.shape[: at - 1], x.shape[at - 1] * x.shape[at], *x.shape[at + 1 :])
