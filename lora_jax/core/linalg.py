"""Low-rank factors of one matrix: the exact truncated SVD, and a randomised one."""

import jax
import jax.numpy as jnp
from jax import lax

#: The factors must not lose digits to the fast reduced-precision modes of an accelerator.
EXACT = lax.Precision.HIGHEST


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` at full precision."""
    return jnp.matmul(x, y, precision=EXACT)


def truncated_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` largest singular triplets of `[m, n]`: U `[m, rank]`, S `[rank]`, Vᵀ `[rank, n]`.

    U·S·Vᵀ is the best approximation of that rank (Eckart and Young, 1936); its squared error is the
    sum of the squares of the other singular values.

    >>> import jax.numpy as jnp
    >>> u, s, vt = truncated_svd(jnp.array([[2.0, 4, 6], [3, 6, 9], [4, 8, 12]]), rank=1)
    >>> (u * s[None] @ vt).round(4)
    Array([[ 2.,  4.,  6.],
           [ 3.,  6.,  9.],
           [ 4.,  8., 12.]], dtype=float32)
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, *, oversample: int = 8, iterations: int = 2
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `truncated_svd`, but nearly the best approximation, from a random sketch of the matrix.

    Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1: the range
    of `(M·Mᵀ)^iterations · M · Ω`, Ω normal with `rank + oversample` columns, orthonormalised after
    each product, and the SVD of the small matrix that is left of `M` on it.

    Args:
      key: a random key, for Ω.
      matrix: `[m, n]`, floating.
      rank: how many triplets.
      oversample: columns of the sketch beyond `rank`.
      iterations: power iterations; more of them where the singular values fall slowly.
    """
    width = min(rank + oversample, *matrix.shape)
    sketch = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    basis, _ = jnp.linalg.qr(matmul(matrix, sketch))
    for _ in range(iterations):
        basis, _ = jnp.linalg.qr(matmul(matrix.T, basis))
        basis, _ = jnp.linalg.qr(matmul(matrix, basis))
    u, s, vt = truncated_svd(matmul(basis.T, matrix), rank)
    return matmul(basis, u), s, vt


def balanced(
    svd: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A = U·√(S/scale) and B = √(S/scale)·Vᵀ, so that `scale · A · B = U·S·Vᵀ`; scale > 0."""
    u, s, vt = svd
    root = jnp.sqrt(s / scale)
    return u * root[None], root[:, None] * vt
