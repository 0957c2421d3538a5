"""A linear layer with an adapter: y = x·W + (x·A)·(alpha/r·B) + bias, as pure functions."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.switches import with_dropout
from lora_jax.engine.transform import lora
from lora_jax.layers import initial

Params = dict[str, Any]


def init(
    key: jax.Array,
    fan_in: int,
    fan_out: int,
    rank: int,
    alpha: float | None = 1.0,
    *,
    bias: bool = True,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Params:
    """Return `{"kernel": LoraWeight, "bias": [fan_out]}`, a tree as `lora_jax.init` returns it.

    W ~ N(0, 1/√fan_in), A ~ N(0, 0.02), and B and the bias are zero, so that the layer is a plain
    one before training. All of `lora_jax` works on the tree: `split`, `merge`, `freeze`, `save`.

    Args:
      key: a random key.
      fan_in: the number of input features.
      fan_out: the number of output features.
      rank: the rank; 0 makes a plain layer, whose kernel is an array.
      alpha: numerator of the scale alpha/rank; None means alpha = rank.
      bias: whether the layer has a bias.
      dropout: the rate at which `apply` drops inputs of the adapter, if it gets a key.
      dtype: the dtype of W and the bias; A and B are float32.

    Raises:
      ConfigError: a size, the rank, alpha or dropout has no meaning.

    >>> import jax
    >>> params = init(jax.random.key(0), 768, 512, rank=16, alpha=32)
    >>> params["kernel"].a.shape, params["kernel"].b.shape, float(params["kernel"].scale)
    ((768, 16), (16, 512), 2.0)
    """
    kernel = initial.weight(
        key, (fan_in, fan_out), rank, alpha, use="dot_general", dropout=dropout, dtype=dtype
    )
    return {"kernel": kernel} | ({"bias": jnp.zeros(fan_out, dtype)} if bias else {})


def apply(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Apply the layer: `[..., fan_in]` to `[..., fan_out]`.

    Args:
      params: parameters that `init` or `merge` returned; the kernel is adapted, or an array.
      x: the input.
      key: a random key for dropout; None switches dropout off.

    >>> import jax.numpy as jnp
    >>> apply({"kernel": jnp.array([[2.0, 4.0]]), "bias": jnp.ones(2)}, jnp.ones((1, 1)))
    Array([[3., 5.]], dtype=float32)
    """
    if key is not None:
        params = with_dropout(params, key)
    return lora(_linear, on_dense="error")(params, x)


def _linear(params: Params, x: jax.Array) -> jax.Array:
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape) if "bias" in params else y
