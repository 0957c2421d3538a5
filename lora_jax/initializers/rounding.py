"""Round weights to a coarse format and back: 8-bit integers, or NF4."""

import jax
import jax.numpy as jnp

# QLoRA, https://arxiv.org/abs/2305.14314, appendix E: quantiles of a normal distribution in
# [-1, 1], eight of them negative (with -1), zero, and seven positive (with 1).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


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
    values = jnp.array(NF4, matrix.dtype)
    middles = (values[1:] + values[:-1]) / 2
    code = ((blocks / largest)[..., None] > middles[None, None, None]).sum(-1)
    return (values[code] * largest).reshape(padded.shape)[:inputs]


def _largest(x: jax.Array, axis: int) -> jax.Array:
    """Return the largest absolute value along `axis`, which is kept; 1 if all values are zero."""
    largest = jnp.abs(x).max(axis, keepdims=True)
    return jnp.where(largest > 0, largest, 1)
