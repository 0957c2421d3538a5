"""LoftQ: round the base weight, and fit A and B to what the rounding lost."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.checks import is_integer
from lora_jax.core.dtypes import round_to
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, truncated_svd
from lora_jax.core.matrices import as_factors, from_matrices, map_matrices
from lora_jax.core.quantized.coding import check_kind
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized, quantize_array
from lora_jax.initializers.rounding import nf4
from lora_jax.initializers.signature import (
    Initializer,
    InitialValues,
    apply_per_matrix,
    require_positive,
    widen,
)


def loftq(quantizer: Callable[[jax.Array], jax.Array] | str = nf4, steps: int = 5) -> Initializer:
    """Return an initializer that rounds the base and fits `scale·A·B` to what the rounding lost.

    LoftQ, https://arxiv.org/abs/2310.08659, algorithm 1, alternates two steps:
    Q = quantizer(W − scale·A·B), and scale·A·B = the best rank-r approximation of W − Q. The base
    becomes Q. Before training, the function is closer to the original than with the rounded weight
    alone, but not equal to it.

    Args:
      quantizer: the name of a kind, such as "nf4": the base becomes a `QuantizedWeight` with the
        very codes that A and B were fitted to, its blocks along the last in axis. Or a function of
        a float32 matrix `[in, out]` that returns its rounded values, of the same shape and dtype:
        `rounding.nf4`, `rounding.int8` or your own; the base then holds these values as floats.
      steps: how often the two steps alternate, at least 1; the paper uses 1, 5 and 10.

    Returns:
      An initializer for `LoraConfig(init=...)`. It raises ConfigError unless the scale is positive,
      if blocks of the kind do not divide the axis, or if the base is quantized already: what that
      rounding lost is not known.

    Raises:
      ConfigError: `quantizer` is neither a function nor a kind that can be written, or `steps` is
        not a positive integer.

    >>> import jax, jax.numpy as jnp
    >>> w = jax.random.normal(jax.random.key(0), (64, 32))
    >>> initializer = loftq(nf4, steps=2)
    >>> q, a, b = initializer(jax.random.key(1), w, Layout("io"), 8, 1.0, jnp.float32)
    >>> bool(jnp.linalg.norm(w - q - a @ b) < 0.8 * jnp.linalg.norm(w - nf4(w)))
    True
    """
    if isinstance(quantizer, str):
        check_kind("loftq", "quantizer", quantizer)
    elif not callable(quantizer):
        raise ConfigError(
            f"loftq: quantizer must be a function or the name of a kind, got {quantizer!r}"
        )
    if not is_integer(steps) or steps < 1:
        raise ConfigError(f"loftq: steps must be a positive integer, got {steps!r}")

    fit: Any = functools.partial(_alternate, quantizer, steps)

    def initialize(
        key: jax.Array, w: Any, layout: Layout, rank: int, scale: float, dtype: Any
    ) -> InitialValues:
        require_positive(scale)
        if is_quantized(w):
            raise ConfigError(
                f"loftq: the base is quantized already ({w.kind}), so what that rounding lost is "
                "not known. Give loftq the floating weights, which it quantizes itself: init="
                'initializers.loftq("nf4"); or use init="kaiming"'
            )
        if not isinstance(quantizer, str):
            return apply_per_matrix(fit, key, w, layout, rank, scale, dtype)
        _check_blocks(w, layout, quantizer)
        return _fit_codes(quantizer, steps, w, layout, rank, scale, dtype)

    return initialize


def _alternate(
    quantizer: Any,
    steps: int,
    key: jax.Array,
    w: jax.Array,
    rank: int,
    scale: jax.Array,
    dtype: Any,
) -> InitialValues:
    """Return Q, A and B of one matrix."""
    wide = widen(w)

    def step(_: int, last: InitialValues) -> InitialValues:
        _, a, b = last
        rounded = round_to(quantizer(wide - scale * matmul(a, b)), w.dtype)
        return rounded, *balanced(truncated_svd(wide - rounded, rank), scale)

    a, b = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
    return lax.fori_loop(0, steps, step, (wide, a.astype(wide.dtype), b.astype(wide.dtype)))


def _check_blocks(w: Any, layout: Layout, kind: str) -> None:
    at = layout.positions("i")[-1]
    block = KINDS[kind].block or w.shape[at]
    if w.shape[at] % block:
        raise ConfigError(
            f"loftq: blocks of {block} ({kind}) do not divide axis {at} of {tuple(w.shape)}. "
            "Leave the weight out with exclude=, or choose a kind with shorter blocks"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4, 6))
def _fit_codes(
    kind: str, steps: int, w: jax.Array, layout: Layout, rank: int, scale: jax.Array, dtype: Any
) -> InitialValues:
    """Return the codes, A and B of a weight, matrix by matrix."""
    ins = layout.select("i", w.shape)

    def encode(matrix: jax.Array) -> QuantizedWeight:
        """Quantize along the last in axis of a matrix `[fan_in, fan_out]`."""
        return quantize_array(matrix.reshape(*ins, -1), kind, -2)

    def decode(weight: QuantizedWeight) -> jax.Array:
        # as it will be used: rounded to the dtype that the weight stands for
        return dataclasses.replace(weight, dtype=w.dtype).dequantize().astype(jnp.float32)

    def one(key: jax.Array, matrix: jax.Array) -> Any:
        wide = matrix.astype(jnp.float32)
        quantize = lambda x: decode(encode(x)).reshape(x.shape)
        _, a, b = _alternate(quantize, steps - 1, key, wide, rank, scale, dtype)
        codes = encode(wide - scale * matmul(a, b))
        fitted = truncated_svd(wide - decode(codes).reshape(wide.shape), rank)
        a, b = (x.astype(dtype) for x in balanced(fitted, scale))
        flat = {name: x.reshape(-1, x.shape[-1]) for name, x in codes.fields.items()}
        return flat, a, b

    fields, a, b = map_matrices(one, jax.random.key(0), layout, w)
    at = layout.positions("i")[-1]
    rows = math.prod(ins[:-1])

    def placed(x: jax.Array) -> jax.Array:
        shape = list(w.shape)
        shape[at] = x.shape[-2] // rows
        return from_matrices(x, layout, tuple(shape))

    fields = {name: placed(x) for name, x in fields.items()}
    made = QuantizedWeight(fields, kind, at - w.ndim, w.dtype)
    return made, *as_factors(a, b, layout, w.shape)
