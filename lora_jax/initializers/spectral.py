"""Starts that take A and B out of the weight: the base keeps the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, randomized_svd, truncated_svd
from lora_jax.initializers.signature import Factors, by_matrix, check_positive, widened


def pissa(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """A and B hold the weight's largest singular triplets; the base keeps the residual.

    PiSSA, https://arxiv.org/abs/2404.02948: of W = U·S·Vᵀ, A = U_r·√(S_r/scale),
    B = √(S_r/scale)·V_rᵀ and W' = W − scale·A·B, computed in float32 (with A and B as `dtype`
    rounds them) and rounded to the base's dtype: the function starts unchanged.

    Raises:
      ConfigError: the scale is not positive.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[3.0, 0, 0], [0, 2, 0]])
    >>> rest, a, b = pissa(jax.random.key(0), w, Layout("io"), 1, 1.0, jnp.float32)
    >>> a @ b, rest
    (Array([[3., 0., 0.],
           [0., 0., 0.]], dtype=float32), Array([[0., 0., 0.],
           [0., 2., 0.]], dtype=float32))
    """
    check_positive(scale)
    return by_matrix(_principal, key, w, layout, rank, scale, dtype)


def pissa_fast(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """`pissa` with a randomised SVD: nearly the largest triplets, at a fraction of the time.

    W' is computed from the A and B that came out, so the function starts unchanged all the same.
    https://arxiv.org/abs/2404.02948, section 4; the SVD is https://arxiv.org/abs/0909.4061 with 8
    extra columns and two power iterations.

    Raises:
      ConfigError: the scale is not positive.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[3.0, 0, 0], [0, 2, 0]])
    >>> rest, a, b = pissa_fast(jax.random.key(0), w, Layout("io"), 1, 1.0, jnp.float32)
    >>> bool(abs(rest + a @ b - w).max() < 1e-6)
    True
    """
    check_positive(scale)
    return by_matrix(_nearly_principal, key, w, layout, rank, scale, dtype)


def olora(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> Factors:
    """B is orthonormal, from the QR decomposition of the weight; the base keeps the residual.

    OLoRA, https://arxiv.org/abs/2406.01775: of Wᵀ = Q·R, A = R[:r]ᵀ, B = Q[:, :r]ᵀ and
    W' = W − scale·A·B, computed and rounded as `pissa`'s: the function starts unchanged.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[0.0, 2.0], [3, 4]])
    >>> rest, a, b = olora(jax.random.key(0), w, Layout("io"), 1, 1.0, jnp.float32)
    >>> abs(b), bool(abs(a @ b + rest - w).max() < 1e-6)
    (Array([[0., 1.]], dtype=float32), True)
    """
    return by_matrix(_orthonormal, key, w, layout, rank, scale, dtype)


def _principal(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any) -> Factors:
    return _taken_out(w, *balanced(truncated_svd(widened(w), rank), scale), scale, dtype)


def _nearly_principal(
    key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any
) -> Factors:
    return _taken_out(w, *balanced(randomized_svd(key, widened(w), rank), scale), scale, dtype)


def _orthonormal(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any) -> Factors:
    q, r = jnp.linalg.qr(widened(w).T)
    return _taken_out(w, r[:rank].T, q[:, :rank].T, scale, dtype)


def _taken_out(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, dtype: Any) -> Factors:
    """W − scale·A·B with A and B as `dtype` rounds them: what that loses stays in the base."""
    w, a, b = widened(w), a.astype(dtype), b.astype(dtype)
    return w - scale * matmul(a.astype(w.dtype), b.astype(w.dtype)), a, b
