"""Sizes of the models of images, under the names in config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_jax.core.checks import is_size, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder.config import EPSILONS


@dataclass(frozen=True)
class LayersConfig:
    """Sizes of layers that mix all tokens: of images, and of SigLIP's texts.

    Raises `ValueError` at construction for a size below one, for a width that the number of heads
    does not divide, or for an activation that is not in `ACTIVATIONS`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and f.name != "num_labels" and not is_size(value):
                raise ValueError(
                    f"{name}.{f.name} must be a positive int, got {shown_value(value)}"
                )
            if f.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name}.{f.name} must be true or false, got {shown_value(value)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{name}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not is_within(self.layer_norm_eps, *EPSILONS):
            raise ValueError(
                f"{name}.layer_norm_eps must be a positive number up to 1, "
                f"got {shown_value(self.layer_norm_eps)}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"{name}.hidden_act {shown_value(self.hidden_act)} is not one of "
                f"{sorted(ACTIVATIONS)}"
            )


@dataclass(frozen=True)
class VisionConfig(LayersConfig):
    """Configuration of a vision transformer; the switches are what the families differ in.

    Attributes:
      class_token: whether a learned token comes before the patches.
      patch_bias: whether the patch embedding has a bias.
      first_norm: whether there is a norm before the layers.
      pools: how an image becomes one vector: the first token ("first"), or attention from a
        learned query ("attention").
      norms_all: whether the last norm is of all tokens, or only of the pooled one.
      num_labels: of the classifier on the first token; 0 without one.

    Raises `ValueError` as `LayersConfig`, or if patches do not fill the image.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    class_token: bool = True
    patch_bias: bool = True
    first_norm: bool = False
    pools: str = "first"
    norms_all: bool = True
    num_labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(
                f"VisionConfig: image_size {self.image_size} is below patch_size {self.patch_size}"
            )

    @property
    def tokens(self) -> int:
        """The number of tokens of an image."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token


@dataclass(frozen=True)
class TextConfig(LayersConfig):
    """Configuration of SigLIP's encoder of texts."""

    hidden_act: str = "gelu_pytorch_tanh"
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int = 768


@dataclass(frozen=True)
class SiglipConfig:
    """Configuration of SigLIP: of its two encoders."""

    vision: VisionConfig
    text: TextConfig

    @property
    def num_attention_heads(self) -> int:
        """The number of groups of heads that both encoders can be cut into."""
        return math.gcd(self.vision.num_attention_heads, self.text.num_attention_heads)


def from_json(cls: type, settings: Any, **switches: Any) -> Any:
    """Read a configuration of one of the classes above from a parsed `config.json`.

    Raises:
      ValueError: it is not an object, or the class refuses a value.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"a configuration must be an object, got {shown_value(settings)}")
    names = {f.name for f in fields(cls)} - {"num_labels", *switches}
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return cls(**{**given, **switches})
