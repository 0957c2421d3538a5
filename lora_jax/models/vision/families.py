"""The models of images: one row per `model_type` of config.json."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.core.checks import is_integer, is_size
from lora_jax.core.foreign import shown_value
from lora_jax.models.vision import naming
from lora_jax.models.vision.config import TextConfig, TwoTowersConfig, VisionConfig, from_json
from lora_jax.models.vision.transformer import VisionTransformer
from lora_jax.models.vision.two_towers import TwoTowers
from lora_jax.models.weights.family import Family, Options

#: How the names of classes in transformers end; the second has two classifiers.
_CLASSIFIER, _TEACHER = "ForImageClassification", "ForImageClassificationWithTeacher"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "patch_size")


def _of(options: Options) -> dict[str, Any]:
    return {"scan": options.scan, "remat": options.remat}


def _is(settings: Mapping[str, Any], *ends: str) -> bool:
    """Return whether the name of a model's class in transformers ends with one of these."""
    classes = settings.get("architectures")
    return isinstance(classes, list) and any(str(x).endswith(ends) for x in classes)


def _labels(settings: Mapping[str, Any]) -> int:
    """Return the number of classes of a model that has a classifier, or 0."""
    if not _is(settings, _CLASSIFIER, _TEACHER):
        return 0
    given = settings.get("id2label")
    return len(given) if isinstance(given, Mapping) else 2  # transformers' own default


def _check_size(name: str, value: Any) -> None:
    if not is_size(value):
        raise ValueError(f"{name} must be a positive int, got {shown_value(value)}")


def _vit(settings: Mapping[str, Any], options: Options) -> nn.Module:
    given, labels = {"layer_norm_eps": 1e-12, **settings}, _labels(settings)
    pooler = 0
    if settings.get(_POOLER) and not labels:
        pooler = settings.get("pooler_output_size") or settings.get("hidden_size") or 768
        _check_size("pooler_output_size", pooler)
    config = from_json(
        VisionConfig,
        given,
        num_labels=labels,
        pooler_size=pooler,
        distillation_token=settings["model_type"] == "deit",
        teacher=_is(settings, _TEACHER),
        **_of(options),
    )
    return VisionTransformer(config)


#: The key of a setting that the names of the tensors decide.
_POOLER = "add_pooling_layer"


def _has_pooler(names: Collection[str]) -> dict[str, Any]:
    return {_POOLER: any(name.endswith("pooler.dense.weight") for name in names)}


def _of_siglip(settings: Any, options: Options) -> VisionConfig:
    given = {"hidden_act": "gelu_pytorch_tanh", **settings} if settings else settings
    has_head = isinstance(settings, Mapping) and settings.get("vision_use_head", True)
    pools = "attention" if has_head else "first"
    return from_json(
        VisionConfig, given, class_token=False, qkv_bias=True, pools=pools, **_of(options)
    )


def _siglip_vision(settings: Mapping[str, Any], options: Options) -> nn.Module:
    return VisionTransformer(_of_siglip(settings, options))


def _towers(settings: Mapping[str, Any], known: str) -> list[dict[str, Any]]:
    """Return what a config.json says of the encoders of images and of texts."""
    if _labels(settings):
        raise ValueError(
            f"architectures: {settings['architectures'][0]} is not supported, only {known}"
        )
    found = []
    for name in ("vision", "text"):
        # what the first versions of transformers wrote wins over what the later ones did
        given = settings.get(f"{name}_config_dict") or settings.get(f"{name}_config") or {}
        if not isinstance(given, Mapping):
            raise ValueError("vision_config and text_config must be objects")
        found.append(dict(given))
    return found


def _siglip(settings: Mapping[str, Any], options: Options) -> nn.Module:
    vision, text = _towers(settings, "SiglipModel")
    width = text.get("projection_size") or text.get("hidden_size") or 768
    config = TwoTowersConfig(
        _of_siglip({"hidden_act": "gelu_pytorch_tanh", **vision}, options),
        from_json(TextConfig, text, qkv_bias=True, projection_size=width, **_of(options)),
    )
    if config.vision.hidden_size != config.text.projection_size:
        raise ValueError(
            f"text_config.projection_size {shown_value(width)} is not vision_config.hidden_size "
            f"{config.vision.hidden_size}: images and texts cannot be compared"
        )
    return TwoTowers(config)


_OF_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def _of_clip(settings: Mapping[str, Any], projection: int, options: Options) -> VisionConfig:
    own = {**_OF_CLIP, "patch_size": 32, **settings}
    switches: dict[str, Any] = {
        "qkv_bias": True,
        "patch_bias": False,
        "first_norm": True,
        "norms_all": False,
    }
    switches |= _of(options)
    return from_json(VisionConfig, own, **switches, projection_size=projection)


def _projection(settings: Mapping[str, Any]) -> int:
    width = settings.get("projection_dim")
    width = 512 if width is None else width
    _check_size("projection_dim", width)
    return width


def _clip_vision(settings: Mapping[str, Any], options: Options) -> nn.Module:
    has_projection = _is(settings, "WithProjection")
    config = _of_clip(settings, _projection(settings) if has_projection else 0, options)
    return VisionTransformer(config)


def _clip(settings: Mapping[str, Any], options: Options) -> nn.Module:
    vision, text = _towers(settings, "CLIPModel")
    width, end = _projection(settings), text.get("eos_token_id", 49407)
    if not is_integer(end):
        raise ValueError(f"text_config.eos_token_id must be an int, got {shown_value(end)}")
    defaults = {**_OF_CLIP, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 49408}
    defaults |= {"num_attention_heads": 8, "max_position_embeddings": 77}
    switches: dict[str, Any] = {"qkv_bias": True, "causal": True, "projection_bias": False}
    switches |= _of(options)
    config = from_json(
        TextConfig,
        {**defaults, **text},
        **switches,
        projection_size=width,
        end="highest" if end == 2 else end,
    )
    return TwoTowers(TwoTowersConfig(_of_clip(vision, width, options), config, bias=False))


def _pixels(module: Any) -> dict[str, Any]:
    c = module.config
    shape = (1, *c.sides, c.num_channels)
    return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _pixels_and_ids(module: Any) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return {**_pixels(VisionTransformer(module.config.vision)), "ids": ids}


def _nested(*names: str) -> tuple[str, ...]:
    return tuple(f"{part}_config.{name}" for part in ("vision", "text") for name in names)


#: A row but for its names and module.
_images = partial(Family, kind="vision", embedding=(), sizes=_SIZES, inputs=_pixels)
_two_towers: dict[str, Any] = {
    "sizes": _nested(*_SIZES, "vocab_size", "max_position_embeddings"),
    "inputs": _pixels_and_ids,
    "layers": _nested("num_hidden_layers"),
}
#: A row of ViT and what has its names, but for those.
_vits = partial(
    _images,
    model_class="Model",
    module=_vit,
    by_tensors=_has_pooler,
    kept=(r"((vi|dei)t\.)?(pooler\..*|embeddings\.mask_token)", r"decoder\..*"),
)
#: A row whose files may have the numbers of positions, which follow from the sizes.
_positioned = partial(_images, dropped=(r".*\.position_ids",))

#: `model_type` in config.json -> what is known of it.
VISION: dict[str, Family] = {
    "vit": _vits(
        stem="ViT",
        naming=partial(naming.vit, "vit."),
        in_files=partial(naming.vit_in_files, "vit."),
    ),
    "deit": _vits(
        stem="DeiT",
        naming=partial(naming.vit, "deit."),
        in_files=partial(naming.vit_in_files, "deit."),
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
        **_two_towers,
    ),
    "clip": _positioned(
        stem="CLIP",
        model_class="Model",
        module=_clip,
        naming=naming.clip,
        **_two_towers,
    ),
    "clip_vision_model": _positioned(
        stem="CLIP",
        model_class="VisionModel",
        module=_clip_vision,
        naming=naming.clip_vision,
    ),
}
