"""SigLIP (Zhai et al., 2023, https://arxiv.org/abs/2303.15343): images and texts in one space."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.on_mesh import Embedding, dot_general
from lora_jax.models.vision.config import SiglipConfig, TextConfig
from lora_jax.models.vision.layer import Layer, norm
from lora_jax.models.vision.transformer import VisionTransformer


class TextTower(nn.Module):
    """SigLIP's encoder of texts, in which each token sees all, padding too."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map token ids `[batch, length]` to one vector per text, `[batch, projection]`.

        Raises:
          ValueError: the texts are longer than the number of position embeddings.
        """
        c = self.config
        if ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"length {ids.shape[1]} is above max_position_embeddings "
                f"{c.max_position_embeddings}"
            )
        x = Embedding(c.vocab_size, c.hidden_size, name="token")(ids)
        shape = (c.max_position_embeddings, c.hidden_size)
        position = self.param("position", nn.initializers.normal(0.02), shape)
        x = x + position[None, : ids.shape[1]]
        for i in range(c.num_hidden_layers):
            x = Layer(c, name=f"layer_{i}")(x)
        last = norm(c, "norm")(x)[:, -1]
        return nn.Dense(c.projection_size, name="head", dot_general=dot_general)(last)


class Siglip(nn.Module):
    """Both encoders, and how well each image and each text belong together."""

    config: SiglipConfig

    def setup(self) -> None:
        self.vision = VisionTransformer(self.config.vision)
        self.text = TextTower(self.config.text)
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, (1,))
        self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (1,))

    def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        """Compare images with texts.

        Args:
          pixels: as `VisionTransformer` takes them, `[images, height, width, channels]`.
          ids: integers `[texts, length]`, padded to the length that the model was trained with.

        Returns:
          Logits `[images, texts]`, of whether the text belongs to the image.
        """
        one, other = self.images(pixels), self.texts(ids)
        products = jnp.einsum("id,td->it", one, other)
        return products * jnp.exp(self.logit_scale)[None] + self.logit_bias[None]

    def images(self, pixels: jax.Array) -> jax.Array:
        """Return one vector of length 1 per image, `[images, width]`."""
        return _unit(self.vision.pooled(pixels))

    def texts(self, ids: jax.Array) -> jax.Array:
        """Return one vector of length 1 per text, `[texts, width]`."""
        return _unit(self.text(ids))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
