"""Images and texts in one space, by an encoder of each.

SigLIP (Zhai et al., 2023, https://arxiv.org/abs/2303.15343) and CLIP (Radford et al., 2021,
https://arxiv.org/abs/2103.00020) are switches of one module, `TwoTowers`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models import layers
from lora_jax.models.on_mesh import Embedding, dot_general
from lora_jax.models.remat import rematerialized
from lora_jax.models.vision.config import TextConfig, TwoTowersConfig
from lora_jax.models.vision.layer import Layer, norm
from lora_jax.models.vision.transformer import VisionTransformer


class TextTower(nn.Module):
    """An encoder of texts: each token sees all, padding too, or those before it."""

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
        layer, count = rematerialized(Layer, c.remat, scan=c.scan), c.num_hidden_layers
        if c.scan:
            x = layers.run(layer(c, name="layers"), count, x)
        else:
            x = layers.run([layer(c, name=f"layer_{i}") for i in range(count)], count, x)
        last = _end(norm(c, "norm")(x), ids, c.end)
        bias = c.projection_bias
        return nn.Dense(c.projection_size, bias, name="head", dot_general=dot_general)(last)


def _end(x: jax.Array, ids: jax.Array, end: int | str | None) -> jax.Array:
    """Return the token that is the text, of `[batch, length, width]`."""
    if end is None:
        return x[:, -1]
    place = jnp.argmax(ids if end == "highest" else ids == end, axis=1)
    picks = place[:, None] == jnp.arange(ids.shape[1])[None]
    return jnp.einsum("bl,blw->bw", picks.astype(x.dtype), x)


class TwoTowers(nn.Module):
    """Both encoders, and how well each image and each text belong together."""

    config: TwoTowersConfig

    def setup(self) -> None:
        self.vision = VisionTransformer(self.config.vision)
        self.text = TextTower(self.config.text)
        shape = (1,) if self.config.bias else ()
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, shape)
        if self.config.bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, shape)

    def __call__(self, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        """Compare images with texts.

        Args:
          pixels: as `VisionTransformer` takes them, `[images, height, width, channels]`.
          ids: integers `[texts, length]`: SigLIP's padded to the length that the model was trained
            with, CLIP's with its end token.

        Returns:
          Logits `[images, texts]`, of whether the text belongs to the image.
        """
        one, other = self.images(pixels), self.texts(ids)
        products = jnp.einsum("id,td->it", one, other)
        products = products * jnp.exp(self.logit_scale).reshape(1, 1)
        return products + self.logit_bias[None] if self.config.bias else products

    def images(self, pixels: jax.Array) -> jax.Array:
        """Return one vector of length 1 per image, `[images, width]`."""
        return _unit(self.vision.pooled(pixels))

    def texts(self, ids: jax.Array) -> jax.Array:
        """Return one vector of length 1 per text, `[texts, width]`."""
        return _unit(self.text(ids))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
