"""Initializers that decompose the weight: A and B hold one part, the base keeps the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import round_to
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, randomized_svd, truncated_svd
from lora_jax.initializers.signature import InitialValues, apply_per_matrix, require_positive, widen


def pissa(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Move the weight's largest singular triplets into A and B; the base keeps the residual.

    PiSSA, https://arxiv.org/abs/2404.02948: with W = U·S·Vᵀ, A = U_r·√(S_r/scale),
    B = √(S_r/scale)·V_rᵀ and W' = W − scale·A·B. W' is computed in float32, from A and B as rounded
    to `dtype`, and then rounded to the base's dtype, so the function is unchanged before training.

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
    require_positive(scale)
    return apply_per_matrix(_principal, key, w, layout, rank, scale, dtype)


def pissa_fast(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Initialize as `pissa`, with a randomized SVD that takes a fraction of the time.

    A and B hold nearly the largest singular triplets. W' is computed from these A and B, so the
    function is unchanged before training all the same. See https://arxiv.org/abs/2404.02948,
    section 4; the SVD is https://arxiv.org/abs/0909.4061 with 8 extra columns and two power
    iterations.

    Raises:
      ConfigError: the scale is not positive.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[3.0, 0, 0], [0, 2, 0]])
    >>> rest, a, b = pissa_fast(jax.random.key(0), w, Layout("io"), 1, 1.0, jnp.float32)
    >>> bool(abs(rest + a @ b - w).max() < 1e-6)
    True
    """
    require_positive(scale)
    return apply_per_matrix(_nearly_principal, key, w, layout, rank, scale, dtype)


def olora(
    key: jax.Array, w: jax.Array, layout: Layout, rank: int, scale: float, dtype: Any
) -> InitialValues:
    """Take A and an orthonormal B from the weight's QR decomposition; the base keeps the residual.

    OLoRA, https://arxiv.org/abs/2406.01775: with Wᵀ = Q·R, A = R[:r]ᵀ, B = Q[:, :r]ᵀ and
    W' = W − scale·A·B. W' is computed and rounded as in `pissa`, so the function is unchanged
    before training.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[0.0, 2.0], [3, 4]])
    >>> rest, a, b = olora(jax.random.key(0), w, Layout("io"), 1, 1.0, jnp.float32)
    >>> abs(b), bool(abs(a @ b + rest - w).max() < 1e-6)
    (Array([[0., 1.]], dtype=float32), True)
    """
    return apply_per_matrix(_orthonormal, key, w, layout, rank, scale, dtype)


def _principal(
    key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any
) -> InitialValues:
    return _subtract_update(w, *balanced(truncated_svd(widen(w), rank), scale), scale, dtype)


def _nearly_principal(
    key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any
) -> InitialValues:
    return _subtract_update(w, *balanced(randomized_svd(key, widen(w), rank), scale), scale, dtype)


def _orthonormal(
    key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: Any
) -> InitialValues:
    q, r = jnp.linalg.qr(widen(w).T)
    return _subtract_update(w, r[:rank].T, q[:, :rank].T, scale, dtype)


def _subtract_update(
    w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, dtype: Any
) -> InitialValues:
    """Return W − scale·A·B, A and B, both rounded to `dtype`: the base keeps what that loses."""
    w, a, b = widen(w), round_to(a, dtype), round_to(b, dtype)
    return w - scale * matmul(a, b), a, b
