"""Vision transformers (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929) in Flax Linen.

The families ViT, DeiT, SigLIP and CLIP are switches of one module, `VisionTransformer`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models import layers
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import attend
from lora_jax.models.on_mesh import dot_general
from lora_jax.models.remat import rematerialized
from lora_jax.models.vision.config import VisionConfig
from lora_jax.models.vision.layer import FeedForward, Layer, dense, norm


class Embeddings(nn.Module):
    """Patches as tokens: a convolution without overlap, and learned positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map `[batch, height, width, channels]` to `[batch, tokens, width]`."""
        c = self.config
        patch = nn.Conv(
            c.hidden_size, c.patch, c.patch, "VALID", use_bias=c.patch_bias, name="patch"
        )
        shape = (c.tokens, c.hidden_size)
        position = self.param("position", nn.initializers.normal(0.02), shape)
        x = patch(pixels.astype(position.dtype))
        x = x.reshape(x.shape[0], -1, c.hidden_size)
        for name, is_there in {
            "distillation": c.distillation_token,
            "class": c.class_token,
        }.items():
            if is_there:
                x = _behind(self.param(name, nn.initializers.zeros, (c.hidden_size,)), x)
        return x + position[None]


def _behind(token: jax.Array, x: jax.Array) -> jax.Array:
    """Return tokens `[batch, tokens, width]` behind one `[width]`, which is sharded as they are."""
    first = jnp.zeros_like(x[:, :1]) + token.astype(x.dtype)[None, None]
    return jnp.concatenate([first, x], axis=1)


class AttentionPool(nn.Module):
    """One vector per image: attention from a learned query, and a feed-forward network."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, tokens, width]` to `[batch, width]`."""
        c = self.config
        batch, tokens, width = x.shape
        heads = c.num_attention_heads
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))
        made = nn.DenseGeneral((3, width), name="qkv", dot_general=dot_general)(
            _behind(probe[0, 0], x)
        )
        made = made.reshape(batch, 1 + tokens, 3, heads, width // heads)
        mixed = attend(made[:, :1, 0], made[:, 1:, 1], made[:, 1:, 2], causal=False)
        y = dense(width, "output")(mixed.reshape(batch, 1, width))
        return (y + FeedForward(c, name="mlp")(norm(c, "norm")(y)))[:, 0]


class VisionTransformer(nn.Module):
    """An encoder of images, perhaps with a classifier.

    >>> config = VisionConfig(
    ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...     image_size=8, patch_size=4, num_labels=3,
    ... )
    >>> model, pixels = VisionTransformer(config), jnp.zeros((2, 8, 8, 3))
    >>> variables = jax.jit(model.init)(jax.random.key(0), pixels)
    >>> jax.eval_shape(model.apply, variables, pixels).shape
    (2, 3)
    """

    config: VisionConfig

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        if c.first_norm:
            self.first_norm = nn.LayerNorm(epsilon=c.layer_norm_eps)
        layer = rematerialized(Layer, c.remat, scan=c.scan)
        if c.scan:
            self.layers = layer(c)
        else:
            self.layer = [layer(c) for _ in range(c.num_hidden_layers)]
        self.norm = nn.LayerNorm(epsilon=c.layer_norm_eps)
        if c.pools == "attention":
            self.pool = AttentionPool(c)
        if c.pooler_size:
            self.pooler = _dense(c.pooler_size)
        if c.projection_size:
            self.projection = _dense(c.projection_size, bias=False)
        if c.teacher:
            self.cls_classifier = _dense(c.num_labels)
            self.distillation_classifier = _dense(c.num_labels)
        elif c.num_labels:
            self.classifier = _dense(c.num_labels)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode or classify images.

        Args:
          pixels: floats `[batch, height, width, channels]` of the size in the configuration,
            scaled and normalized as `models.ImageProcessor` does.

        Returns:
          With a classifier logits `[batch, labels]`, otherwise hidden states `[batch, tokens,
          width]`, in the parameters' dtype.

        Raises:
          ValueError: the images have another size.
        """
        if self.config.teacher:
            x = self.hidden(pixels)
            return (self.cls_classifier(x[:, 0]) + self.distillation_classifier(x[:, 1])) / 2
        if self.config.num_labels:
            return self.classifier(self.hidden(pixels)[:, 0])
        if self.is_initializing():
            self.pooled(pixels)
        return self.hidden(pixels)

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """Return the hidden states of all tokens, `[batch, tokens, width]`."""
        c = self.config
        wanted = (*c.sides, c.num_channels)
        if pixels.shape[1:] != wanted:
            raise ValueError(f"pixels must be [batch, {str(wanted)[1:-1]}], got {pixels.shape}")
        x = self.embeddings(pixels)
        if c.first_norm:
            x = self.first_norm(x)
        x = layers.run(self.layers if c.scan else self.layer, c.num_hidden_layers, x)
        return self.norm(x) if c.norms_all else x

    def pooled(self, pixels: jax.Array) -> jax.Array:
        """Return one vector per image, `[batch, width]`, or as wide as the model projects it."""
        c, x = self.config, self.hidden(pixels)
        if c.pools == "attention":
            x = self.pool(x)
        else:
            x = x[:, 0] if c.norms_all else self.norm(x[:, 0])
        if c.pooler_size:
            x = ACTIVATIONS[c.pooler_act](self.pooler(x))
        return self.projection(x) if c.projection_size else x


def _dense(width: int, bias: bool = True) -> nn.Dense:
    return nn.Dense(width, bias, dot_general=dot_general)
