"""Sizes of the models of images, under the names in config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_jax.core.checks import is_size, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder.config import EPSILONS
from lora_jax.models.remat import policy_name


@dataclass(frozen=True)
class LayersConfig:
    """Sizes of layers that mix all tokens: of images, and of SigLIP's texts.

    Attributes:
      causal: whether a token sees only those before it, as in CLIP's texts.
      scan: stack the layers' parameters and run the layers in one `lax.scan`.
      remat: which activations each layer recomputes in the backward pass, as in `DecoderConfig`.

    Raises `ValueError` at construction for a size below one, for a width that the number of heads
    does not divide, for an activation that is not in `ACTIVATIONS`, or for an unknown `remat`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    causal: bool = False
    scan: bool = False
    remat: bool | str = False

    def __post_init__(self) -> None:
        policy_name(self.remat)
        name = type(self).__name__
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and f.name not in _OR_NONE and not is_size(value):
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
        check_activation(f"{name}.hidden_act", self.hidden_act)


#: Numbers that are 0 where there is nothing to count.
_OR_NONE = ("num_labels", "projection_size", "pooler_size")


def check_activation(name: str, value: Any) -> None:
    """Raise `ValueError` unless a value is the name of an activation."""
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"{name} {shown_value(value)} is not one of {sorted(ACTIVATIONS)}")


@dataclass(frozen=True)
class VisionConfig(LayersConfig):
    """Configuration of a vision transformer; the switches are what the families differ in.

    Attributes:
      image_size, patch_size: in pixels, one number or height and width.
      class_token: whether a learned token comes before the patches.
      distillation_token: whether another one comes behind that, as in DeiT.
      patch_bias: whether the patch embedding has a bias.
      first_norm: whether there is a norm before the layers.
      pools: how an image becomes one vector: the first token ("first"), or attention from a
        learned query ("attention").
      pooler_size, pooler_act: of a layer on the first token, which makes the vector; 0 without one.
      projection_size: of the vector after a projection; 0 without one.
      norms_all: whether the last norm is of all tokens, or only of the pooled one.
      num_labels: of the classifier on the first token; 0 without one.
      teacher: whether there are two classifiers, on the class token and on that of the
        distillation, whose mean is the result.

    Raises `ValueError` as `LayersConfig`, or if patches do not fill the image.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    class_token: bool = True
    distillation_token: bool = False
    patch_bias: bool = True
    first_norm: bool = False
    pools: str = "first"
    pooler_size: int = 0
    pooler_act: str = "tanh"
    projection_size: int = 0
    norms_all: bool = True
    num_labels: int = 0
    teacher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(one < patch for one, patch in zip(self.sides, self.patch, strict=True)):
            raise ValueError(
                f"VisionConfig: image_size {self.image_size} is below patch_size {self.patch_size}"
            )
        check_activation("VisionConfig.pooler_act", self.pooler_act)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        return _pair("image_size", self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair("patch_size", self.patch_size)

    @property
    def tokens(self) -> int:
        """The number of tokens of an image."""
        rows, columns = (one // patch for one, patch in zip(self.sides, self.patch, strict=True))
        return rows * columns + self.class_token + self.distillation_token


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if is_size(value) else value
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(is_size, pair)):
        raise ValueError(
            f"VisionConfig.{name} must be a positive int or two of them, got {shown_value(value)}"
        )
    return pair


@dataclass(frozen=True)
class TextConfig(LayersConfig):
    """Configuration of SigLIP's and CLIP's encoder of texts.

    Attributes:
      projection_size: of the vector of a text.
      projection_bias: whether the projection has a bias.
      end: which token is the text: the last one (None), the first one with this id, or, as in
        CLIP's first files, the one with the highest id ("highest").
    """

    hidden_act: str = "gelu_pytorch_tanh"
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int = 768
    projection_bias: bool = True
    end: int | str | None = None


@dataclass(frozen=True)
class TwoTowersConfig:
    """Configuration of SigLIP and CLIP: of their two encoders.

    Attributes:
      bias: whether a bias is added to the logits.
    """

    vision: VisionConfig
    text: TextConfig
    bias: bool = True

    @property
    def num_attention_heads(self) -> int:
        """The number of groups of heads that both encoders can be cut into."""
        return math.gcd(self.vision.num_attention_heads, self.text.num_attention_heads)


#: Fields that a family decides, not a key of the same name.
_SWITCHES = (
    *("class_token", "distillation_token", "patch_bias", "first_norm", "pools", "pooler_size"),
    *("projection_size", "norms_all", "num_labels", "teacher"),
    *("causal", "projection_bias", "end", "scan", "remat"),
)


def from_json(cls: type, settings: Any, **switches: Any) -> Any:
    """Read a configuration of one of the classes above from a parsed `config.json`.

    Raises:
      ValueError: it is not an object, or the class refuses a value.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"a configuration must be an object, got {shown_value(settings)}")
    names = {f.name for f in fields(cls)} - {*_SWITCHES, *switches}
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    for name in ("image_size", "patch_size"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    return cls(**{**given, **switches})
