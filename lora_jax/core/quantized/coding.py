"""`Coding`: how a weight is quantized, apart from its values, so that others can be likewise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.kinds import WRITABLE, kind_named
from lora_jax.core.quantized.weight import QuantizedWeight, quantize_array


@dataclasses.dataclass(frozen=True)
class Coding:
    """The kind, the axis and the blocks of a quantized weight, and the dtypes of its arrays.

    >>> import jax.numpy as jnp
    >>> w = quantize_array(jnp.arange(64.0).reshape(64, 1), "int4", axis=0)
    >>> again = Coding.of(w).encode(w.dequantize())
    >>> bool((again.fields["codes"] == w.fields["codes"]).all())
    True
    """

    kind: str
    axis: int  # counted from the end
    block: int | None  # None for the kind's own
    dtype: Any  # that the weight stands for
    floats: tuple[tuple[str, Any], ...] = ()  # dtypes of the floating arrays, by name

    @classmethod
    def of(cls, w: QuantizedWeight, kind: str | None = None) -> "Coding":
        """Return the coding of a weight, or that of another kind along the same axis."""
        if kind is not None and kind != w.kind:
            return cls(kind, w.axis, None, w.dtype)
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        floats = tuple((name, x.dtype) for name, x in sorted(w.fields.items()) if is_float(x))
        return cls(w.kind, w.axis, w.block, w.dtype, floats)

    def encode(self, values: jax.Array) -> QuantizedWeight:
        """Return these values, quantized."""
        made = quantize_array(values, self.kind, self.axis, self.block)
        fields = dict(made.fields)
        for name, dtype in self.floats:
            fields[name] = fields[name].astype(dtype)
        return dataclasses.replace(made, fields=fields, dtype=self.dtype)


def check_kind(caller: str, option: str, kind: Any) -> None:
    """Raise unless an option is True or False, or names a kind that can be written.

    Raises:
      ConfigError: it does not.
    """
    if isinstance(kind, bool):
        return
    if kind_named(kind).encode is None:
        raise ConfigError(
            f"{caller}: {option}={kind!r} can be read from files, but not written; choose one of "
            f"{', '.join(WRITABLE)}"
        )


def coding_of(w: QuantizedWeight, kind: bool | str, instead: str) -> Coding:
    """Return the coding in which a changed weight is quantized again.

    Args:
      w: the weight.
      kind: True for its own kind, or the name of another.
      instead: what to do where that cannot be, for the message.

    Raises:
      ConfigError: numbers of the kind cannot be written, or its blocks do not divide the axis.
    """
    coding = Coding.of(w, None if kind is True else str(kind))
    form = kind_named(coding.kind)
    if form.encode is None:
        raise ConfigError(
            f"{form.name} can be read from files, but not written, so the merged weight cannot "
            f'become codes of it. Name another kind, such as "nf4", or {instead}'
        )
    size, block = w.shape[w.axis], coding.block or form.block
    if block is not None and size % block:
        raise ConfigError(
            f"blocks of {block} ({form.name}) do not divide axis {w.axis} of {list(w.shape)}. "
            f"Name a kind with shorter blocks, or {instead}"
        )
    return coding
