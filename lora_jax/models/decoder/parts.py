"""The linear layers and norms of which a decoder is made."""

from flax import linen as nn

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.on_mesh import dot_general


def dense(c: DecoderConfig, width: int, bias: bool, name: str | None) -> nn.Dense:
    return nn.Dense(
        width, bias, dtype=c.dtype, param_dtype=c.param_dtype, name=name, dot_general=dot_general
    )


def norm(c: DecoderConfig, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(c.rms_norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name=name)
