"""The linear layers, norms and activations of which a decoder is made."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lora_jax.models.activations import ACTIVATIONS as OTHERS
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.on_mesh import dot_general


def _in_float32(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{name: partial(_in_float32, function) for name, function in OTHERS.items()},
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def dense(c: DecoderConfig, width: int, bias: bool, name: str | None) -> nn.Dense:
    return nn.Dense(
        width, bias, dtype=c.dtype, param_dtype=c.param_dtype, name=name, dot_general=dot_general
    )


def norm(c: DecoderConfig, name: str | None) -> nn.Module:
    kind = OffsetNorm if c.unit_offset else nn.RMSNorm
    return kind(c.rms_norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)


class OffsetNorm(nn.Module):
    """Gemma's RMSNorm: it multiplies by one plus its parameter, all in float32."""

    epsilon: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis; the same shape, in `dtype`."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        gain = 1 + scale.astype(x.dtype)
        return (x * jnp.expand_dims(gain, range(x.ndim - 1))).astype(self.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap · tanh(x / cap) in the dtype of `x`, or `x` without a cap."""
    if cap is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (cap * jnp.tanh(wide / cap)).astype(x.dtype)
