"""The layers of models of images: attention of all tokens, then a feed-forward network."""

import jax
from flax import linen as nn

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import attend
from lora_jax.models.on_mesh import by_rows, dot_general
from lora_jax.models.vision.config import LayersConfig


def dense(width: int, name: str, bias: bool = True) -> nn.Dense:
    return nn.Dense(width, bias, name=name, dot_general=dot_general)


def norm(c: LayersConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.layer_norm_eps, name=name)


class Attention(nn.Module):
    """Multi-head attention in which each token sees all, or those before it."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, tokens, width]` to the same shape and dtype."""
        c = self.config
        batch, tokens, width = x.shape
        heads = c.num_attention_heads

        def project(name: str) -> jax.Array:
            y = dense(width, name, c.qkv_bias)(x)
            return y.reshape(batch, tokens, heads, width // heads)

        mixed = attend(project("query"), project("key"), project("value"), causal=c.causal)
        return dense(width, "output")(mixed.reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """`down(activation(up(x)))`."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, tokens, width]` to the same shape and dtype."""
        c = self.config
        y = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, "up")(x))
        return dense(c.hidden_size, "down")(y)


class Layer(nn.Module):
    """Attention, then a feed-forward network, each after a norm and with a residual connection."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, tokens, width]` to the same shape and dtype."""
        c = self.config
        x = by_rows(x + Attention(c, name="attention")(norm(c, "attention_norm")(x)))
        return by_rows(x + FeedForward(c, name="mlp")(norm(c, "mlp_norm")(x)))
