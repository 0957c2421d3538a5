"""Low-rank factors of a matrix, by an exact or a randomized truncated SVD."""

import jax
import jax.numpy as jnp
from jax import lax

#: The factors must not lose digits to an accelerator's fast modes of reduced precision.
EXACT = lax.Precision.HIGHEST


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x @ y` at full precision."""
    return jnp.matmul(x, y, precision=EXACT)


def truncated_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the `rank` largest singular triplets: U `[m, rank]`, S `[rank]` and Vᵀ `[rank, n]`.

    U·S·Vᵀ is the best approximation of `matrix`, `[m, n]`, of that rank (Eckart and Young, 1936).
    Its squared error is the sum of the squares of the other singular values. Of several matrices,
    `[*batch, m, n]`, it returns those of each.

    >>> import jax.numpy as jnp
    >>> u, s, vt = truncated_svd(jnp.array([[2.0, 4, 6], [3, 6, 9], [4, 8, 12]]), rank=1)
    >>> (u * s[None] @ vt).round(4)
    Array([[ 2.,  4.,  6.],
           [ 3.,  6.,  9.],
           [ 4.,  8., 12.]], dtype=float32)
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def product_svd(
    a: jax.Array, b: jax.Array, rank: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the largest singular triplets of `a @ b` without computing the product.

    With A = Q₁·R₁ and Bᵀ = Q₂·R₂ it is Q₁·(R₁·R₂ᵀ)·Q₂ᵀ, whose singular values are those of the
    small matrix in the middle.

    Args:
      a: `[*batch, m, r]`, floating.
      b: `[*batch, r, n]`.
      rank: the number of triplets, at most min(m, r, n); None for that many.

    >>> import jax.numpy as jnp
    >>> u, s, vt = product_svd(jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0]]))
    >>> s, (u * s[None] @ vt)[:, 1].round(4)
    (Array([10.], dtype=float32), Array([6., 8.], dtype=float32))
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    small = matmul(r_a, r_b.mT)
    u, s, vt = truncated_svd(small, min(small.shape[-2:]) if rank is None else rank)
    return matmul(q_a, u), s, matmul(vt, q_b.mT)


def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, *, oversample: int = 8, iterations: int = 2
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return nearly what `truncated_svd` returns, from a random sketch of the matrix.

    Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1: compute a
    basis of the range of `(M·Mᵀ)^iterations · M · Ω`, where Ω is normal with `rank + oversample`
    columns, orthonormalized after each product; then take the SVD of `M` projected on that basis,
    which is small.

    Args:
      key: a random key, for Ω.
      matrix: `[m, n]`, floating.
      rank: the number of triplets.
      oversample: the number of columns of the sketch beyond `rank`.
      iterations: the number of power iterations; use more if the singular values fall slowly.
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
    """Return A = U·√(S/scale) and B = √(S/scale)·Vᵀ, so that scale·A·B = U·S·Vᵀ; scale > 0."""
    u, s, vt = svd
    root = jnp.sqrt(s / scale)
    return u * root[..., None, :], root[..., :, None] * vt
