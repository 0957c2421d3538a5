"""Round weights to a coarse format and back: 8-bit integers, or NF4."""

import jax
import jax.numpy as jnp

from lora_jax.core.quantized.bits import look_up, nearest
from lora_jax.core.quantized.nf4 import VALUES

#: The 16 values of NF4, see `nf4`.
NF4 = VALUES


def int8(matrix: jax.Array) -> jax.Array:
    """Round to 255 equal steps, -127 to 127, between each output's largest absolute values.

    Vector-wise absmax quantization of LLM.int8(), https://arxiv.org/abs/2208.07339, section 2.1.

    Args:
      matrix: `[in, out]`, floating.

    Returns:
      The rounded values (not the integers), of the same shape and dtype. Rounding them again
      changes at most the last digit.

    >>> import jax.numpy as jnp
    >>> int8(jnp.array([[127.0], [3.4], [-0.6]]))
    Array([[127.],
           [  3.],
           [ -1.]], dtype=float32)
    """
    step = _largest(matrix, 0) / 127
    return jnp.round(matrix / step) * step


def nf4(matrix: jax.Array, block: int = 64) -> jax.Array:
    """Round to the 16 values of NF4 times the largest absolute value of each block.

    QLoRA, https://arxiv.org/abs/2305.14314, section 3, without double quantization. A block is
    `block` consecutive inputs of one output, as in bitsandbytes, which divides a PyTorch weight in
    this way if its number of inputs is a multiple of `block`.

    Args:
      matrix: `[in, out]`, floating.
      block: how many inputs share one absmax.

    Returns:
      The rounded values (not the codes), of the same shape and dtype.

    >>> import jax.numpy as jnp
    >>> nf4(jnp.array([[2.0], [1.5], [0.01]])).round(4)
    Array([[2.    ],
           [1.4459],
           [0.    ]], dtype=float32)
    """
    inputs, outputs = matrix.shape
    padded = jnp.pad(matrix, ((0, -inputs % block), (0, 0)))
    blocks = padded.reshape(-1, block, outputs)
    largest = _largest(blocks, 1)
    rounded = look_up(nearest(blocks / largest, VALUES), VALUES).astype(matrix.dtype)
    return (rounded * largest).reshape(padded.shape)[:inputs]


def _largest(x: jax.Array, axis: int) -> jax.Array:
    """Return the largest absolute value along `axis`, which is kept; 1 if all values are zero."""
    largest = jnp.abs(x).max(axis, keepdims=True)
    return jnp.where(largest > 0, largest, 1)
