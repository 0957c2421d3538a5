"""A linear map of low rank without a base weight: y = x · A · B · alpha/r, as pure functions."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.algebra import delta
from lora_jax.core.config import LoraConfig
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import StructureError
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.engine.forms import Forms
from lora_jax.engine.lazy_weight import RANK, Axis, LazyWeight
from lora_jax.engine.products import Product, add_update
from lora_jax.engine.provenance import Provenance
from lora_jax.layers.initial import check_sizes

Params = dict[str, Any]


def init(
    key: jax.Array,
    dim: int,
    dim_out: int,
    r: int = 8,
    alpha: float | None = None,
    *,
    train_alpha: bool = False,
    dtype: Any = jnp.float32,
) -> Params:
    """Return `{"a": [dim, r], "b": [r, dim_out]}`, both standard normal, as in Zeta's `Lora`.

    Args:
      key: a random key.
      dim: the number of input features.
      dim_out: the number of output features.
      r: the rank.
      alpha: numerator of the scale; None means 1. Only used here with `train_alpha`.
      train_alpha: whether alpha is a parameter too, a float32 scalar, so that it is learned.
      dtype: the dtype of A and B.

    Raises:
      ConfigError: a size, r or alpha has no meaning.

    >>> import jax
    >>> params = init(jax.random.key(0), dim=128, dim_out=64)
    >>> params["a"].shape, params["b"].shape
    ((128, 8), (8, 64))
    """
    check_sizes((dim, dim_out))
    LoraConfig(rank=r, alpha=alpha)  # checks both
    a_key, b_key = jax.random.split(key)
    a = jax.random.normal(a_key, (dim, r), dtype)
    b = jax.random.normal(b_key, (r, dim_out), dtype)
    params = {"a": a, "b": b}
    return params | {"alpha": jnp.float32(1 if alpha is None else alpha)} if train_alpha else params


def apply(params: Params, x: jax.Array, alpha: Any = None) -> jax.Array:
    """Return x · A · B · alpha/r, computed as (x·A)·(alpha/r·B): A·B is never formed.

    Args:
      params: parameters that `init` returned. If they contain an alpha, the argument is ignored.
      x: `[..., dim]`.
      alpha: a number, or a scalar array, through which gradients flow; None means 1.

    Returns:
      `[..., dim_out]`, in the wider dtype of x and the factors.

    Raises:
      StructureError: the last axis of x does not have the size of A's first axis.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 10.0, 100.0]])}
    >>> apply(params, jnp.ones((1, 2)))
    Array([[  3.,  30., 300.]], dtype=float32)
    """
    a, b = params["a"], _scaled_b(params, alpha)
    if x.ndim == 0 or x.shape[-1] != a.shape[0]:
        raise StructureError(f"low_rank: x {x.shape} must end in the input features of A {a.shape}")
    inner, outer = Axis((0,), 0), Axis((1,), 1)
    # A weight without a base: the engine's product with it is only the adapter's part.
    lazy = LazyWeight(
        None,
        a,
        b,
        None,
        axes=(inner, outer),
        a_axes=(inner, RANK),
        b_axes=(RANK, outer),
        shape=(a.shape[0], b.shape[1]),
        dtype=jnp.result_type(a.dtype, params["b"].dtype),
        origin=Provenance.of("", 2),
    )
    free = [Axis((), -2 - i) for i in range(x.ndim - 1)]
    product = Product.of(lazy, x, (*free, inner), (*free, outer))
    dtype = jnp.result_type(x.dtype, lazy.dtype)
    return add_update(None, product, dtype, Forms.for_arrays((x, params)))


def weight(params: Params, alpha: Any = None) -> jax.Array:
    """Return the dense matrix of the map, `A · B · alpha/r`, `[dim, dim_out]`, in float32.

    >>> import jax.numpy as jnp
    >>> weight({"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 10.0]])}, alpha=2)
    Array([[ 2., 20.],
           [ 4., 40.]], dtype=float32)
    """
    b = _scaled_b(params, alpha)
    return delta(LoraWeight(None, params["a"], b, jnp.ones((), b.dtype), layout=Layout("io")))


def _scaled_b(params: Params, alpha: Any) -> jax.Array:
    """Return alpha/r · B, in the dtype that products accumulate in."""
    a, b = params["a"], params["b"]
    alpha = params.get("alpha", 1 if alpha is None else alpha)
    dtype = accumulator(a.dtype, b.dtype)
    return b.astype(dtype) * (jnp.asarray(alpha, dtype) / a.shape[-1])
