"""Bases and roots of tall matrices `[*batch, rows, rank]`, also of those without full rank."""

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.linalg import matmul

#: Singular values below this fraction of the largest are not told from rounding errors: float32
#: numbers give the squares of smaller ones no digit, and a step along them would be huge.
WEAK = 1e-3


def transposed(x: jax.Array) -> jax.Array:
    """Return `x` with its last two axes swapped."""
    return x.swapaxes(-1, -2)


def gram(x: jax.Array) -> jax.Array:
    """Return xᵀ·x, `[*batch, rank, rank]`, at full precision."""
    return matmul(transposed(x), x)


def add_diagonal(x: jax.Array, values: jax.Array) -> jax.Array:
    """Return x + diag(`values`) for square matrices and values `[*batch, rank]`."""
    eye = jnp.expand_dims(jnp.eye(x.shape[-1], dtype=x.dtype), range(x.ndim - 2))
    return x + eye * values[..., None, :]


def on_spectrum(fn: jax.Array, vectors: jax.Array) -> jax.Array:
    """Return V·diag(`fn`)·Vᵀ for new eigenvalues `[*batch, rank]` and the eigenvectors V."""
    return matmul(vectors * fn[..., None, :], transposed(vectors))


def eigenvalues(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the eigenvalues of Gram matrices, ascending and none below 0, and eigenvectors."""
    together = lambda x: tuple(jnp.linalg.eigh(x))
    squares, vectors = lax.platform_dependent(x, cpu=_one_by_one, default=together)
    return jnp.maximum(squares, 0), vectors


def _one_by_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `eigh` does, of one matrix at a time, also under `jax.vmap`.

    A CPU shares out a batch over the threads of a pool and waits for them within the pool. Two
    batches at once, on two cores, wait forever (jax 0.10, `ParallelBatchMap`).
    """
    squares, vectors = lax.map(_eigh, x.reshape(-1, *x.shape[-2:]))
    return squares.reshape(x.shape[:-1]), vectors.reshape(x.shape)


@jax.custom_batching.sequential_vmap
def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.linalg.eigh(x))


def scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `x` over its largest entry, and that entry (1 where all are 0), `[*batch, 1, 1]`.

    Squares of the small numbers in gradients would be zero in float32.
    """
    size = jnp.abs(x).max((-2, -1), keepdims=True)
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    return x / size, size


def inverse_root(x: jax.Array) -> jax.Array:
    """Return (xᵀ·x + (WEAK·σ)²·I)^(-1/2), where σ is the largest singular value of `x`.

    It is symmetric, `[*batch, rank, rank]`, and zero where `x` is.

    >>> import jax.numpy as jnp
    >>> inverse_root(jnp.array([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).round(4)
    Array([[0.5 , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    x, size = scaled(x)
    squares, vectors = eigenvalues(gram(x))
    damped = squares + WEAK**2 * squares[..., -1:]
    some = damped > 0
    roots = jnp.where(some, lax.rsqrt(jnp.where(some, damped, jnp.ones_like(damped))), damped)
    return on_spectrum(roots, vectors) / size


def matrix_sign(x: jax.Array) -> jax.Array:
    """Return U·Vᵀ of the decomposition x = U·S·Vᵀ: `x` with all singular values made 1.

    Those far below the largest stay small: s becomes s/√(s² + (WEAK·max s)²).
    """
    return matmul(x, inverse_root(x))


def orthonormal_basis(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return U = x·T, whose columns are orthonormal and span those of `x`, then T, and a mask.

    T is `[*batch, rank, rank]`. The mask `[*batch, rank]` says which columns of U are there: those
    for singular values that are weak or zero are zero, in T too.

    >>> import jax.numpy as jnp
    >>> basis, t, there = orthonormal_basis(jnp.array([[0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    >>> basis, there
    (Array([[0., 0.],
           [0., 1.],
           [0., 0.]], dtype=float32), Array([False,  True], dtype=bool))
    """
    y, size = scaled(x)
    squares, vectors = eigenvalues(gram(y))
    there = squares > WEAK**2 * squares[..., -1:]
    roots = jnp.where(there, lax.rsqrt(jnp.where(there, squares, 1)), 0).astype(x.dtype)
    t = vectors * roots[..., None, :]
    # Squares of singular values have lost digits; the second pass, near orthonormal, has not.
    gone = jnp.where(there, 0, 1).astype(x.dtype)
    again, rotation = eigenvalues(add_diagonal(gram(matmul(y, t)), gone))
    t = matmul(t, on_spectrum(lax.rsqrt(again), rotation)) * (1 - gone)[..., None, :]
    return matmul(y, t), t / size, there
