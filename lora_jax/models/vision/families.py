"""The models of images: one row per `model_type` of config.json."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.foreign import shown_value
from lora_jax.models.vision import naming
from lora_jax.models.vision.config import SiglipConfig, TextConfig, VisionConfig, from_json
from lora_jax.models.vision.siglip import Siglip
from lora_jax.models.vision.transformer import VisionTransformer
from lora_jax.models.weights.family import Family, Options, refuse_scan_and_remat

_CLASSIFIER = "ForImageClassification"  # how the name of the class in transformers ends
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "patch_size")


def _labels(settings: Mapping[str, Any]) -> int:
    """Return the number of classes of a model that has a classifier, or 0."""
    classes = settings.get("architectures")
    if not isinstance(classes, list) or not any(str(x).endswith(_CLASSIFIER) for x in classes):
        return 0
    given = settings.get("id2label")
    return len(given) if isinstance(given, Mapping) else 2  # transformers' own default


def _vit(settings: Mapping[str, Any], options: Options) -> nn.Module:
    refuse_scan_and_remat(settings, options)
    eps = settings.get("layer_norm_eps", 1e-12)
    config = from_json(
        VisionConfig, {**settings, "layer_norm_eps": eps}, num_labels=_labels(settings)
    )
    return VisionTransformer(config)


def _of_siglip(settings: Any) -> VisionConfig:
    given = {"hidden_act": "gelu_pytorch_tanh", **settings} if settings else settings
    has_head = isinstance(settings, Mapping) and settings.get("vision_use_head", True)
    pools = "attention" if has_head else "first"
    return from_json(VisionConfig, given, class_token=False, qkv_bias=True, pools=pools)


def _siglip_vision(settings: Mapping[str, Any], options: Options) -> nn.Module:
    refuse_scan_and_remat(settings, options)
    return VisionTransformer(_of_siglip(settings))


def _siglip(settings: Mapping[str, Any], options: Options) -> nn.Module:
    refuse_scan_and_remat(settings, options)
    if _labels(settings):
        raise ValueError(f"{settings['architectures'][0]} is not supported, only SiglipModel")
    vision, text = (settings.get(f"{name}_config") or {} for name in ("vision", "text"))
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError("vision_config and text_config must be objects")
    width = text.get("projection_size") or text.get("hidden_size") or 768
    config = SiglipConfig(
        _of_siglip({"hidden_act": "gelu_pytorch_tanh", **vision}),
        from_json(TextConfig, text, qkv_bias=True, projection_size=width),
    )
    if config.vision.hidden_size != config.text.projection_size:
        raise ValueError(
            f"text_config.projection_size {shown_value(width)} is not vision_config.hidden_size "
            f"{config.vision.hidden_size}: images and texts cannot be compared"
        )
    return Siglip(config)


def _clip_vision(settings: Mapping[str, Any], options: Options) -> nn.Module:
    refuse_scan_and_remat(settings, options)
    own = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32, **settings}
    switches = {"qkv_bias": True, "patch_bias": False, "first_norm": True, "norms_all": False}
    return VisionTransformer(from_json(VisionConfig, own, **switches))


def _pixels(module: Any) -> dict[str, Any]:
    c = module.config
    shape = (1, c.image_size, c.image_size, c.num_channels)
    return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _pixels_and_ids(module: Any) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return {**_pixels(VisionTransformer(module.config.vision)), "ids": ids}


def _nested(*names: str) -> tuple[str, ...]:
    return tuple(f"{part}_config.{name}" for part in ("vision", "text") for name in names)


#: A row but for its names and module.
_images = partial(Family, kind="vision", embedding=(), sizes=_SIZES, inputs=_pixels)
#: A row whose files may have the numbers of positions, which follow from the sizes.
_positioned = partial(_images, dropped=(r".*\.position_ids",))

#: `model_type` in config.json -> what is known of it.
VISION: dict[str, Family] = {
    "vit": _images(
        stem="ViT",
        model_class="Model",
        module=_vit,
        naming=naming.vit,
        in_files=naming.vit_in_files,
        kept=(r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token", r"decoder\..*"),
    ),
    "siglip_vision_model": _positioned(
        stem="Siglip",
        model_class="VisionModel",
        module=_siglip_vision,
        naming=naming.siglip_vision,
    ),
    "siglip": _positioned(
        stem="Siglip",
        model_class="Model",
        module=_siglip,
        naming=naming.siglip,
        sizes=_nested(*_SIZES, "vocab_size", "max_position_embeddings"),
        inputs=_pixels_and_ids,
        layers=_nested("num_hidden_layers"),
    ),
    "clip_vision_model": _positioned(
        stem="CLIP",
        model_class="VisionModel",
        module=_clip_vision,
        naming=naming.clip_vision,
    ),
}
